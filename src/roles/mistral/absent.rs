//! Stands in for mistral.rs in a build without it.

use std::convert::Infallible;

use super::Plan;
use crate::engine::Writer;
use crate::error::{Error, Result};

/// There is none.
pub(super) struct Runner(Infallible);

impl Runner {
    pub(super) fn start(plan: Plan) -> Result<(Self, usize)> {
        let text = "this build has no mistralrs: build with `--features mistralrs`, which is on by default";
        Err(Error::invalid(format!("roles.{}.backend", plan.role.name()), text))
    }

    pub(super) fn run(&self, _: Writer) -> Result<()> {
        match self.0 {}
    }
}
