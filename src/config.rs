//! Settings: `rdpo.toml`, then `RDPO_*` variables, then flags; resolved once. The only place that reads the environment.
