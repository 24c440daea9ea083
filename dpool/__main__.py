"""`python -m dpool`: the command line. Nothing else imports this."""

from __future__ import annotations

from dpool.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
