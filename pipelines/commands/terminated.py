"""The exception that SIGTERM raises while a command runs."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""
