"""The paper's experiment in miniature: a made-up language, a base model, paired arms over seeds, a page."""
