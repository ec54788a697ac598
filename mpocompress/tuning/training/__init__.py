"""Training a tensor network on labels, and the scores that labels give."""
