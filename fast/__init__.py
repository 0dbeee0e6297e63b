"""What makes decoding fast, and is not needed to understand it. speculate.py uses it."""
