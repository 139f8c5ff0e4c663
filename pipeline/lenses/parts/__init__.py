"""What several lenses share: layers and their best links, joint edits, charts."""
