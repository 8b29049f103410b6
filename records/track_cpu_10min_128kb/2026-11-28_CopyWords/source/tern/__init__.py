"""What the programs share. Each file is a leaf or nearly one, and knows none of the programs."""
