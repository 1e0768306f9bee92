"""What results are compared with, and how far off they may be: for tests, `bench`, `fastbn verify` and users."""
