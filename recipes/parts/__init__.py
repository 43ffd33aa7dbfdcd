"""Small building blocks that the recipes share."""
