"""Phases under torch.compile: whole phases or regions, and what makes both fast and safe."""
