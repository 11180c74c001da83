"""The template scanner, the evaluation of expressions, and the helper process."""
