"""What live sources share: clocks, back-off, queues, threads, listening addresses."""
