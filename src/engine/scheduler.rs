//! Which tokens of which sequences run in the next step: decode first, then chunks of prompts, then new admissions, within a
//! token budget. A prompt that begins like one being computed waits for those blocks. Pure: no tensor, no clock, no channel.

use std::collections::VecDeque;

use super::blocks::{BlockManager, Chain, root};

/// A sequence as the scheduler sees it.
#[derive(Debug)]
pub struct Sequence {
    /// Id, given by the caller.
    pub id: u64,
    /// Prompt and what was generated.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Tokens whose KV is in the cache.
    pub computed: usize,
    /// Of the prompt, found in the prefix cache when it was first admitted.
    pub cached: usize,
    /// Blocks of the pool it holds, in order.
    pub blocks: Vec<u32>,
    /// Adapter generation, `None` for the base.
    pub generation: Option<String>,
    /// May begin with cached blocks.
    pub reuse: bool,
    /// Lower goes first; among equals the order of ids, which is that of arrival.
    pub priority: i64,
    sealed: usize,
    /// Where its chain of blocks starts: what it can share with others.
    root: Chain,
    chain: Chain,
    admitted_before: bool,
}

impl Sequence {
    /// A sequence that has not begun.
    pub fn new(id: u64, prompt: Vec<u32>, generation: Option<String>, reuse: bool) -> Self {
        let root = root(generation.as_deref(), None);
        Sequence {
            id,
            prompt_len: prompt.len(),
            tokens: prompt,
            computed: 0,
            cached: 0,
            blocks: Vec::new(),
            generation,
            reuse,
            priority: 0,
            sealed: 0,
            root,
            chain: root,
            admitted_before: false,
        }
    }

    /// Shares blocks with those of the same salt only.
    pub(super) fn salt(&mut self, salt: &str) {
        self.root = root(self.generation.as_deref(), Some(salt));
        self.chain = self.root;
    }

    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn rank(&self) -> (i64, u64) {
        (self.priority, self.id)
    }
}

/// `len` tokens of sequence `id`, from its `computed` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// Sequence.
    pub id: u64,
    /// Tokens.
    pub len: usize,
}

/// Limits of a step.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Most sequences at once.
    pub max_sequences: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Share blocks of equal prefixes.
    pub prefix_caching: bool,
}

/// Queues of sequences and the blocks they hold.
pub struct Scheduler {
    limits: Limits,
    pub(super) blocks: BlockManager,
    /// By rank.
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    pub(super) preemptions: usize,
}

impl Scheduler {
    /// With nothing queued and all blocks free.
    pub fn new(limits: Limits, num_blocks: usize) -> Self {
        let blocks = BlockManager::new(num_blocks, limits.block_size);
        Scheduler { limits, blocks, waiting: VecDeque::new(), running: Vec::new(), preemptions: 0 }
    }

    /// Queues a sequence, behind those of its priority that came before.
    pub fn add(&mut self, sequence: Sequence) {
        let at = self.waiting.partition_point(|other| other.rank() < sequence.rank());
        self.waiting.insert(at, sequence);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub(super) fn running(&self) -> &[Sequence] {
        &self.running
    }

    pub(super) fn get(&self, id: u64) -> Option<&Sequence> {
        self.running.iter().find(|sequence| sequence.id == id)
    }

    /// Appends what was sampled for a running sequence.
    pub fn push_token(&mut self, id: u64, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// Takes a sequence out, wherever it is, and gives its blocks back.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = self.running.remove(at);
            release_all(&mut self.blocks, &sequence);
        }
    }

    /// The next step; rows of one adapter stand together.
    pub fn schedule(&mut self) -> Vec<Scheduled> {
        let mut budget = self.limits.max_batch_tokens;
        let mut step: Vec<Scheduled> = Vec::new();
        // Sequences that decode come before those still reading their prompt.
        let mut order: Vec<(bool, (i64, u64))> =
            self.running.iter().map(|sequence| (sequence.pending() > 1, sequence.rank())).collect();
        order.sort_unstable();
        for (_, (_, id)) in order {
            if budget == 0 {
                break;
            }
            // A sequence may have been preempted for one before it.
            let Some(at) = self.running.iter().position(|sequence| sequence.id == id) else { continue };
            let len = self.running[at].pending().min(budget);
            if self.make_room(id, len, &mut step, &mut budget) {
                step.push(Scheduled { id, len });
                budget -= len;
            }
        }
        let mut next = 0;
        while budget > 0 && next < self.waiting.len() && self.running.len() < self.limits.max_sequences {
            if self.waits_for_blocks(&self.waiting[next]) {
                next += 1;
                continue;
            }
            let Some(mut sequence) = self.waiting.remove(next) else { break };
            self.reuse_prefix(&mut sequence);
            let len = sequence.pending().min(budget);
            // The whole prompt and one token must fit beside what runs, or it would be put back at once. A prompt that is only
            // read may fill the pool to its last token.
            let wanted = blocks_for(sequence.tokens.len() + 1, self.limits.block_size).min(self.blocks.total());
            if wanted.saturating_sub(sequence.blocks.len()) > self.blocks.available() {
                self.put_back(sequence);
                break;
            }
            grow(&mut self.blocks, &mut sequence, len, self.limits.block_size);
            step.push(Scheduled { id: sequence.id, len });
            budget -= len;
            self.running.push(sequence);
        }
        step.sort_by(|a, b| self.generation(a.id).cmp(&self.generation(b.id)));
        step
    }

    /// Marks what a step computed and makes its full blocks findable.
    pub fn complete(&mut self, step: &[Scheduled]) {
        let size = self.limits.block_size;
        for scheduled in step {
            let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == scheduled.id) else { continue };
            sequence.computed += scheduled.len;
            while self.limits.prefix_caching && (sequence.sealed + 1) * size <= sequence.computed {
                let tokens = &sequence.tokens[sequence.sealed * size..(sequence.sealed + 1) * size];
                sequence.chain = self.blocks.seal(sequence.blocks[sequence.sealed], sequence.chain, tokens);
                sequence.sealed += 1;
            }
        }
    }

    fn generation(&self, id: u64) -> Option<&String> {
        self.get(id).and_then(|sequence| sequence.generation.as_ref())
    }

    /// Whether a running sequence is computing more of this one's prompt than the cache has: several answers to one prompt, or
    /// prompts that begin alike, compute what they share once.
    fn waits_for_blocks(&self, sequence: &Sequence) -> bool {
        let size = self.limits.block_size;
        if !self.limits.prefix_caching || !sequence.reuse || sequence.tokens.len() <= size {
            return false;
        }
        // The last token is always computed.
        let own = &sequence.tokens[..sequence.tokens.len() - 1];
        let coming = |other: &Sequence| {
            let alike = own.iter().zip(&other.tokens).take_while(|(a, b)| a == b).count();
            other.root == sequence.root && alike / size > other.computed / size
        };
        self.running.iter().filter(|other| other.pending() > 1).any(coming)
    }

    /// Blocks for `len` more tokens of a running sequence, preempting those of the last rank; false if it was itself put back.
    fn make_room(&mut self, id: u64, len: usize, step: &mut Vec<Scheduled>, budget: &mut usize) -> bool {
        loop {
            let Some(at) = self.running.iter().position(|sequence| sequence.id == id) else { return false };
            if grow(&mut self.blocks, &mut self.running[at], len, self.limits.block_size) {
                return true;
            }
            let last = (0..self.running.len()).max_by_key(|at| self.running[*at].rank()).unwrap_or(at);
            let victim = self.running.remove(last);
            self.preemptions += 1;
            step.retain(|scheduled| {
                let keep = scheduled.id != victim.id;
                *budget += if keep { 0 } else { scheduled.len };
                keep
            });
            self.put_back(victim);
        }
    }

    /// Back into the queue, without its blocks.
    fn put_back(&mut self, mut sequence: Sequence) {
        release_all(&mut self.blocks, &sequence);
        sequence.blocks.clear();
        (sequence.computed, sequence.sealed) = (0, 0);
        sequence.chain = sequence.root;
        self.add(sequence);
    }

    fn reuse_prefix(&mut self, sequence: &mut Sequence) {
        if !self.limits.prefix_caching || !sequence.reuse {
            return;
        }
        let (blocks, chain) = self.blocks.find_prefix(sequence.chain, &sequence.tokens);
        sequence.computed = blocks.len() * self.limits.block_size;
        sequence.sealed = blocks.len();
        (sequence.blocks, sequence.chain) = (blocks, chain);
        if !sequence.admitted_before {
            sequence.cached = sequence.computed.min(sequence.prompt_len);
            sequence.admitted_before = true;
        }
    }
}

fn blocks_for(tokens: usize, block_size: usize) -> usize {
    tokens.div_ceil(block_size)
}

/// Blocks for `len` more tokens; all or none.
fn grow(blocks: &mut BlockManager, sequence: &mut Sequence, len: usize, block_size: usize) -> bool {
    let missing = blocks_for(sequence.computed + len, block_size).saturating_sub(sequence.blocks.len());
    if missing > blocks.available() {
        return false;
    }
    sequence.blocks.extend((0..missing).filter_map(|_| blocks.allocate()));
    true
}

fn release_all(blocks: &mut BlockManager, sequence: &Sequence) {
    sequence.blocks.iter().rev().for_each(|id| blocks.release(*id));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scheduler(num_blocks: usize, max_batch_tokens: usize) -> Scheduler {
        Scheduler::new(Limits { max_batch_tokens, max_sequences: 4, block_size: 4, prefix_caching: true }, num_blocks)
    }

    fn check(scheduler: &Scheduler) {
        let held: Vec<Vec<u32>> = scheduler.running.iter().map(|sequence| sequence.blocks.clone()).collect();
        scheduler.blocks.check_integrity(&held);
    }

    #[test]
    fn prompts_are_cut_into_chunks_and_decoding_comes_first() {
        let mut scheduler = scheduler(16, 6);
        scheduler.add(Sequence::new(1, vec![7; 3], None, true));
        scheduler.add(Sequence::new(2, vec![8; 8], None, true));
        let step = scheduler.schedule();
        assert_eq!(step, [Scheduled { id: 1, len: 3 }, Scheduled { id: 2, len: 3 }]);
        scheduler.complete(&step);
        scheduler.push_token(1, 9);
        assert_eq!(scheduler.schedule(), [Scheduled { id: 1, len: 1 }, Scheduled { id: 2, len: 5 }]);
    }

    #[test]
    fn rows_of_one_adapter_stand_together() {
        let mut scheduler = scheduler(16, 64);
        for (id, adapter) in [(1, None), (2, Some("x")), (3, None)] {
            scheduler.add(Sequence::new(id, vec![1; 3], adapter.map(str::to_owned), true));
        }
        let ids: Vec<u64> = scheduler.schedule().iter().map(|scheduled| scheduled.id).collect();
        assert_eq!(ids, [1, 3, 2]);
    }

    #[test]
    fn a_prompt_as_long_as_the_pool_is_admitted() {
        let mut scheduler = scheduler(2, 64);
        scheduler.add(Sequence::new(1, vec![1; 8], None, true));
        assert_eq!(scheduler.schedule(), [Scheduled { id: 1, len: 8 }]);
    }

    /// Runs the scheduler to the end, one token an answer; returns the ids in the order they began and the tokens computed.
    fn drain(scheduler: &mut Scheduler) -> (Vec<u64>, usize) {
        let (mut began, mut computed) = (Vec::new(), 0);
        while !scheduler.is_idle() {
            let step = scheduler.schedule();
            assert!(!step.is_empty(), "a step always makes progress");
            scheduler.complete(&step);
            for scheduled in &step {
                computed += scheduled.len;
                if !began.contains(&scheduled.id) {
                    began.push(scheduled.id);
                }
                if scheduler.get(scheduled.id).unwrap().pending() == 0 {
                    scheduler.remove(scheduled.id);
                }
            }
            check(scheduler);
        }
        (began, computed)
    }

    #[test]
    fn answers_to_one_prompt_compute_its_full_blocks_once() {
        for (len, alone, each) in [(3, 3, 3), (4, 4, 4), (5, 5, 1), (10, 10, 2), (12, 12, 4)] {
            let mut scheduler = scheduler(64, 8);
            for id in 0..4 {
                scheduler.add(Sequence::new(id, vec![5; len], None, true));
            }
            // Another adapter's blocks are of no use.
            scheduler.add(Sequence::new(4, vec![5; len], Some("x".into()), true));
            let (_, computed) = drain(&mut scheduler);
            assert_eq!(computed, 2 * alone + 3 * each, "a prompt of {len} tokens in blocks of 4");
        }
    }

    #[test]
    fn who_waits_for_blocks_holds_up_nobody() {
        let mut scheduler = scheduler(64, 16);
        for (id, prompt) in [(1, vec![5; 10]), (2, vec![5; 10]), (3, vec![6; 3])] {
            scheduler.add(Sequence::new(id, prompt, None, true));
        }
        assert_eq!(drain(&mut scheduler).0, [1, 3, 2]);
    }

    #[test]
    fn lower_priority_goes_first_and_is_put_back_last() {
        let mut scheduler = scheduler(4, 64);
        for (id, priority) in [(1, 0), (2, 5), (3, -1), (4, 0)] {
            scheduler.add(Sequence { priority, ..Sequence::new(id, vec![id as u32; 7], None, true) });
        }
        let step = scheduler.schedule();
        assert_eq!(step.iter().map(|scheduled| scheduled.id).collect::<Vec<_>>(), [3, 1], "two fit");
        scheduler.complete(&step);
        // The pool is full and both need a third block; the one that matters less gives way.
        for id in [1, 3] {
            scheduler.push_token(id, 9);
            scheduler.push_token(id, 9);
        }
        assert_eq!(scheduler.schedule(), [Scheduled { id: 3, len: 2 }]);
        assert_eq!(scheduler.preemptions, 1);
        assert_eq!(scheduler.waiting.iter().map(|sequence| sequence.id).collect::<Vec<_>>(), [1, 4, 2]);
    }

    proptest! {
        #[test]
        fn random_schedules_lose_no_block_and_finish_everything(
            prompts in prop::collection::vec(prop::collection::vec(0u32..3, 1..20), 1..12),
            num_blocks in 8usize..14, budget in 1usize..24, wanted in 1usize..10, cancel in 0u64..12,
        ) {
            let mut scheduler = scheduler(num_blocks, budget);
            for (id, prompt) in prompts.iter().enumerate() {
                let sequence = Sequence::new(id as u64, prompt.clone(), None, id % 3 != 0);
                scheduler.add(Sequence { priority: id as i64 % 2, ..sequence });
            }
            let mut steps = 0;
            while !scheduler.is_idle() {
                let step = scheduler.schedule();
                prop_assert!(!step.is_empty(), "a step always makes progress");
                prop_assert!(step.iter().map(|scheduled| scheduled.len).sum::<usize>() <= budget);
                check(&scheduler);
                scheduler.complete(&step);
                for scheduled in &step {
                    let sequence = scheduler.get(scheduled.id).expect("scheduled sequences run");
                    if sequence.pending() == 0 {
                        let done = sequence.tokens.len() >= sequence.prompt_len + wanted;
                        if done { scheduler.remove(scheduled.id) } else { scheduler.push_token(scheduled.id, steps as u32 % 3) }
                    }
                }
                steps += 1;
                if steps == 3 { scheduler.remove(cancel); }
                prop_assert!(steps < 5000, "preemption must not go in circles");
                check(&scheduler);
            }
            prop_assert_eq!(scheduler.blocks.available(), num_blocks);
        }
    }
}
