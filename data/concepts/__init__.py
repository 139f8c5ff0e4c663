"""Concept data: neutral and topical prompts of our own, and topics from WordNet's glosses (see
`topics`)."""
