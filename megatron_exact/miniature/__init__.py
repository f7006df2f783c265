"""The paper's experiment in miniature: a made-up language, a base model, paired arms over seeds, a page.

Everything runs through the same tools and the same training entry that a real job uses. Nothing here is
needed by them.
"""
