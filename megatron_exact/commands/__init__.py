"""The command line: one function and one parser for each verb, grouped by subject; `cli.py` lists them.

What a parser needs is imported at the top or by the function that makes the parser, and is light: a help or
a bad argument answers without torch, Megatron or transformers. What a command works with is imported after
its arguments were read.
"""
