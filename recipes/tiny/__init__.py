"""The embedded world and its language, and the miniature model that is trained on them."""
