"""A beat that fires faster than its task ends, with and without SingletonTask."""
