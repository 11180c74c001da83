"""The scanner, the evaluation and the helper process of expressions."""
