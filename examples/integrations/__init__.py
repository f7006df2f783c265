"""EXACT's weights in other training stacks, one file each (docs/integrations.md)."""
