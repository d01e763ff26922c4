"""What the user holds: ``fit``, ``attach`` and ``Run``."""
