"""Described features in other people's formats, so that their viewers open them."""
