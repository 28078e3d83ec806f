"""How overloads of PyTorch's operations are done: what all of them share, and a file for each family."""
