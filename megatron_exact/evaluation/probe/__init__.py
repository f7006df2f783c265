"""Does evidence at a distance change how likely the right answer is: margins with and without it."""
