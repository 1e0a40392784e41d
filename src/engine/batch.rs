//! The flat batch of a step: which token stands in which row, where its keys and values go, whose adapter it has.

use std::sync::Arc;

use super::scheduler::Sequence;
use crate::model::{Adapter, LoraRows, PagedBatch, PagedSequence, RowGroup};

/// Rows of a step, those of one sequence side by side.
pub(super) struct Batch {
    /// Token of each row, (N).
    pub(super) ids: Vec<u32>,
    /// Its position in its sequence, (N).
    pub(super) positions: Vec<u32>,
    /// Where the rows live in the cache.
    pub(super) paged: PagedBatch,
    groups: Vec<RowGroup>,
}

impl Batch {
    /// Without rows.
    pub(super) fn new(block_size: usize) -> Self {
        let paged = PagedBatch::new(block_size, Vec::new(), Vec::new());
        Batch { ids: Vec::new(), positions: Vec::new(), paged, groups: Vec::new() }
    }

    /// The next `len` tokens of a sequence.
    pub(super) fn push(&mut self, sequence: &Sequence, len: usize, adapter: Option<&Arc<Adapter>>) {
        let size = self.paged.block_size;
        let (start, context) = (self.ids.len(), sequence.computed + len);
        for position in sequence.computed..context {
            self.ids.push(sequence.tokens[position]);
            self.positions.push(position as u32);
            self.paged.slots.push(sequence.blocks[position / size] * size as u32 + (position % size) as u32);
        }
        let blocks = sequence.blocks[..context.div_ceil(size)].to_vec();
        self.paged.sequences.push(PagedSequence { start, len, context, blocks });
        match self.groups.last_mut() {
            Some(group) if generation(group.adapter.as_ref()) == generation(adapter) => group.len += len,
            _ => self.groups.push(RowGroup { start, len, adapter: adapter.cloned() }),
        }
    }

    /// The adapters of the rows.
    pub(super) fn lora(&self) -> LoraRows<'_> {
        match self.groups.iter().all(|group| group.adapter.is_none()) {
            true => LoraRows::Base,
            false => LoraRows::Served(&self.groups),
        }
    }
}

fn generation(adapter: Option<&Arc<Adapter>>) -> Option<&str> {
    adapter.map(|adapter| adapter.generation.as_str())
}
