"""The cluster core: driver, node, worker, and what they share (wire, store). Doors never import it directly."""
