"""Everything that touches the outside: sources, matchers, views and the command line."""
