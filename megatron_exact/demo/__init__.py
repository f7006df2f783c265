"""`make demo-text`: the whole chain on real text, on two processes of one machine, in minutes.

It drives the same tools and the same training entry that a real job uses, as subprocesses, and prints
every command. Nothing here is needed by them.
"""
