"""The method: dictionaries and pools (`rings`), which negatives enter (`selection`), and the loss; `objective` joins them."""
