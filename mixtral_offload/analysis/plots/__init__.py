"""Pictures. Each function returns (figure, the array it shows)."""
