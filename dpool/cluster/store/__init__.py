"""Memory that crosses process borders without being copied through a socket."""
