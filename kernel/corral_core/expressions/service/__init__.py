"""The template scanner, the evaluation of expressions, and the helper process that runs slow evaluations."""
