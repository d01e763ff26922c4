"""What the user works with: ``fit``, ``attach`` and ``Run``."""
