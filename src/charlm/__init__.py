"""charlm: character-level language models with recurrent networks.

Importing this package imports no torch; its modules do, when they are imported.
"""

__version__ = "0.1.0"
