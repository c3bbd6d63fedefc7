"""Which places of keyframes the pairs confirm, and which they contradict."""
