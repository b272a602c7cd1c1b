"""Other ways to model time beside the same image encoder, to compare with; nothing else in the package uses them."""
