"""Many buyers, few tickets, several workers: one sale, run four ways."""
