//! Who has the device: decode steps first, training between layers, with a bounded share for each.

/// A lock with priorities over one device.
pub struct Gate {}

/// Holding it is having the device.
pub struct GateGuard<'a> {
    _gate: &'a Gate,
}

impl Gate {
    /// `training_share`: the share of device time training keeps while serving is busy, in (0, 1].
    pub fn new(_training_share: f64) -> Self {
        todo!()
    }

    /// For an engine step: next in line, at most one training layer away.
    pub fn serve(&self) -> GateGuard<'_> {
        todo!()
    }

    /// For one layer of training: waits while serving is owed the device.
    pub fn train(&self) -> GateGuard<'_> {
        todo!()
    }
}
