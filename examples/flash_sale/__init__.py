"""Many buyers, few tickets, several workers: one sale, run three ways."""
