"""What live sources and views share: clocks, back-off, queues, threads, addresses, counters."""
