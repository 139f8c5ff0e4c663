"""Training the dictionaries of all sites: which starts from which (plan), one site (site), all of
them (schedule)."""
