"""Phases compiled ahead of time, kept in a directory.

The directory has a package of torch's AOTInductor for each phase, not zipped, the weights that are part of these, and
``manifest.json``, which says what they were compiled from and for. Packages are native code, and loading one runs it:
load only what you trust as you would trust a program. Nothing is unpickled.
"""
