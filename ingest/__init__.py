"""A clip request in, a verified clip (video bytes, audio bytes, facts) or a typed failure out."""
