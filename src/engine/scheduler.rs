//! Which tokens of which sequences run in the next step: decode first, then chunks of prompts, then new admissions, within a
//! token budget. A prompt that begins like one being computed waits for those blocks. Pure: no tensor, no clock, no channel.
//!
//! Roles share the engine fairly: of equal priorities, the next to begin is of the role that was served the fewest tokens since
//! the queue was last empty, and a role that runs nothing gets a place even when others have taken all.

use std::collections::BTreeMap;

use super::blocks::{BlockManager, Chain, root};

/// A sequence as the scheduler sees it.
#[derive(Debug)]
pub struct Sequence {
    /// Id, given by the caller.
    pub id: u64,
    /// Prompt, what was generated, and a draft of what may follow while a step computes it.
    pub tokens: Vec<u32>,
    /// Tokens of the draft.
    drafted: usize,
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
    /// How many of its first tokens may come from cached blocks; the last never does.
    pub reusable: usize,
    /// Lower goes first; among equals the role served least, and then the order of ids, which is that of arrival.
    pub priority: i64,
    /// On whose account it runs.
    pub role: &'static str,
    sealed: usize,
    /// Where its chain of blocks starts: what it can share with others.
    root: Chain,
    chain: Chain,
    admitted_before: bool,
    /// Passed over in this step: it waits for blocks that another is computing.
    held_up: bool,
}

impl Sequence {
    /// A sequence that has not begun.
    pub fn new(id: u64, prompt: Vec<u32>, generation: Option<String>, reuse: bool) -> Self {
        let root = root(generation.as_deref(), None);
        Sequence {
            id,
            prompt_len: prompt.len(),
            tokens: prompt,
            drafted: 0,
            computed: 0,
            cached: 0,
            blocks: Vec::new(),
            generation,
            reusable: if reuse { usize::MAX } else { 0 },
            priority: 0,
            role: "",
            sealed: 0,
            root,
            chain: root,
            admitted_before: false,
            held_up: false,
        }
    }

    /// Shares blocks with those of the same salt only.
    pub(super) fn salt(&mut self, salt: &str) {
        self.root = root(self.generation.as_deref(), Some(salt));
        self.chain = self.root;
    }

    /// Tokens without the draft.
    pub(super) fn settled(&self) -> usize {
        self.tokens.len() - self.drafted
    }

    pub(super) fn pending(&self) -> usize {
        self.settled() - self.computed
    }

    /// How many of its first tokens need not be computed where others have computed them.
    fn shareable(&self) -> usize {
        self.reusable.min(self.tokens.len() - 1)
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
    pub(super) limits: Limits,
    pub(super) blocks: BlockManager,
    /// By rank.
    waiting: Vec<Sequence>,
    running: Vec<Sequence>,
    /// Tokens computed for each role since the queue was last empty.
    served: BTreeMap<&'static str, u64>,
    pub(super) preemptions: usize,
}

impl Scheduler {
    /// With nothing queued and all blocks free.
    pub fn new(limits: Limits, num_blocks: usize) -> Self {
        let blocks = BlockManager::new(num_blocks, limits.block_size);
        let (waiting, running) = (Vec::new(), Vec::new());
        Scheduler { limits, blocks, waiting, running, served: BTreeMap::new(), preemptions: 0 }
    }

    /// Queues a sequence, behind those of its priority and role that came before.
    pub fn add(&mut self, sequence: Sequence) {
        let role = sequence.role;
        // A role that had nothing to ask for begins level with the others: what it left unused is no credit.
        if self.waiting.iter().all(|other| other.role != role) {
            let level = self.waiting.iter().map(|other| self.served(other.role)).min().unwrap_or(0);
            let own = self.served.entry(role).or_default();
            *own = level.max(*own);
        }
        self.enqueue(sequence);
    }

    fn enqueue(&mut self, sequence: Sequence) {
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

    /// Appends a draft to a sequence that decodes, for this step only: as much of it as there are blocks for, given back with
    /// what was not right of it, so that nobody is put back for it. How much.
    pub fn draft(&mut self, id: u64, draft: &[u32]) -> usize {
        let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) else { return 0 };
        let mut fits = |len: &usize| grow(&mut self.blocks, sequence, 1 + len, self.limits.block_size);
        let len = (1..=draft.len()).rev().find(|len| fits(len)).unwrap_or(0);
        sequence.tokens.extend(&draft[..len]);
        sequence.drafted = len;
        *self.served.entry(sequence.role).or_default() += len as u64;
        self.forget_served();
        len
    }

    /// Appends what was sampled for a running sequence. What was drafted stays as long as it is what was sampled.
    pub fn push_token(&mut self, id: u64, token: u32) {
        let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) else { return };
        let settled = sequence.settled();
        if sequence.tokens.get(settled) == Some(&token) {
            sequence.drafted -= 1;
            sequence.computed += 1;
            seal(&mut self.blocks, sequence, self.limits);
            return;
        }
        sequence.tokens.truncate(settled);
        sequence.tokens.push(token);
        sequence.drafted = 0;
        let kept = blocks_for(sequence.computed, self.limits.block_size).min(sequence.blocks.len());
        sequence.blocks.drain(kept..).rev().for_each(|id| self.blocks.release(id));
    }

    /// Takes a sequence out, wherever it is, and gives its blocks back.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let sequence = self.running.remove(at);
            release_all(&mut self.blocks, &sequence);
        }
        self.forget_served();
    }

    /// An empty queue owes nobody anything.
    fn forget_served(&mut self) {
        if self.waiting.is_empty() {
            self.served.clear();
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
            let (role, len) = (self.running[at].role, self.running[at].pending().min(budget));
            if self.make_room(id, len, &mut step, &mut budget) {
                self.take(id, role, len, &mut step, &mut budget);
            }
        }
        self.waiting.iter_mut().for_each(|sequence| sequence.held_up = false);
        while budget > 0 {
            let Some(next) = self.next_waiting() else { break };
            if self.waits_for_blocks(&self.waiting[next]) {
                self.waiting[next].held_up = true;
                continue;
            }
            let mut sequence = self.waiting.remove(next);
            if !self.has_place(&sequence, &mut step, &mut budget) {
                self.enqueue(sequence);
                break;
            }
            self.reuse_prefix(&mut sequence);
            // What the cache has not, of the whole prompt and one token, must fit beside what runs and has yet to read: or one of
            // them would be put back at once. A prompt that is only read may fill the pool to its last token.
            let owed: usize = self.running.iter().map(|other| self.missing(other)).sum();
            if self.missing(&sequence) + owed > self.blocks.available() {
                self.put_back(sequence);
                break;
            }
            if !std::mem::replace(&mut sequence.admitted_before, true) {
                sequence.cached = sequence.computed.min(sequence.prompt_len);
            }
            let len = sequence.pending().min(budget);
            grow(&mut self.blocks, &mut sequence, len, self.limits.block_size);
            self.take(sequence.id, sequence.role, len, &mut step, &mut budget);
            self.running.push(sequence);
        }
        self.forget_served();
        step.sort_by(|a, b| self.generation(a.id).cmp(&self.generation(b.id)));
        step
    }

    /// Marks what a step computed, drafts aside, and makes its full blocks findable.
    pub fn complete(&mut self, step: &[Scheduled]) {
        for scheduled in step {
            let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == scheduled.id) else { continue };
            sequence.computed += scheduled.len - sequence.drafted;
            seal(&mut self.blocks, sequence, self.limits);
        }
    }

    fn served(&self, role: &str) -> u64 {
        self.served.get(role).copied().unwrap_or(0)
    }

    /// Puts tokens of a sequence into the step and on its role's account.
    fn take(&mut self, id: u64, role: &'static str, len: usize, step: &mut Vec<Scheduled>, budget: &mut usize) {
        step.push(Scheduled { id, len });
        *budget -= len;
        *self.served.entry(role).or_default() += len as u64;
    }

    /// Who may begin next. The queue is in order of rank, and the first of equals is taken.
    fn next_waiting(&self) -> Option<usize> {
        let candidates = (0..self.waiting.len()).filter(|at| !self.waiting[*at].held_up);
        candidates.min_by_key(|at| (self.waiting[*at].priority, self.served(self.waiting[*at].role)))
    }

    /// Whether a sequence may run beside the others. Where all places are taken, a role that has none gets one from the role that
    /// has most; who is put back for it finds most of its blocks in the cache again.
    fn has_place(&mut self, sequence: &Sequence, step: &mut Vec<Scheduled>, budget: &mut usize) -> bool {
        if self.running.len() < self.limits.max_sequences {
            return true;
        }
        if self.places(sequence.role) > 0 {
            return false;
        }
        // The last place of a role is not taken away: two roles would take it from each other for ever.
        let may_go = |other: &Sequence| other.priority >= sequence.priority && self.places(other.role) > 1;
        let Some(last) = self.first_to_go(may_go) else { return false };
        self.preempt(last, step, budget);
        true
    }

    fn places(&self, role: &str) -> usize {
        self.running.iter().filter(|other| other.role == role).count()
    }

    /// Who is put back for others: of the last priority the role that runs most, and of that the last that came.
    fn first_to_go(&self, may_go: impl Fn(&Sequence) -> bool) -> Option<usize> {
        let candidates = (0..self.running.len()).filter(|at| may_go(&self.running[*at]));
        candidates.max_by_key(|at| {
            let Sequence { priority, role, id, .. } = &self.running[*at];
            (*priority, self.places(role), *id)
        })
    }

    /// Blocks that a sequence still needs for all its tokens and one more.
    fn missing(&self, sequence: &Sequence) -> usize {
        let wanted = blocks_for(sequence.tokens.len() + 1, self.limits.block_size).min(self.blocks.total());
        wanted.saturating_sub(sequence.blocks.len())
    }

    fn generation(&self, id: u64) -> Option<&String> {
        self.get(id).and_then(|sequence| sequence.generation.as_ref())
    }

    /// Whether a running sequence is computing more of this one's prompt than the cache has: several answers to one prompt, or
    /// prompts that begin alike, compute what they share once.
    fn waits_for_blocks(&self, sequence: &Sequence) -> bool {
        let size = self.limits.block_size;
        let own = &sequence.tokens[..sequence.shareable()];
        if !self.limits.prefix_caching || own.len() < size {
            return false;
        }
        let coming = |other: &Sequence| {
            let alike = own.iter().zip(&other.tokens).take_while(|(a, b)| a == b).count();
            (other.root == sequence.root && alike / size > other.computed / size).then_some(alike / size)
        };
        // Blocks that will be there; what is there already is not waited for.
        let most = self.running.iter().filter(|other| other.pending() > 1).filter_map(coming).max();
        most.is_some_and(|most| most > self.blocks.count_prefix(sequence.chain, &own[..most * size]))
    }

    /// Blocks for `len` more tokens of a running sequence, putting back who is first to go; false if that is itself.
    fn make_room(&mut self, id: u64, len: usize, step: &mut Vec<Scheduled>, budget: &mut usize) -> bool {
        loop {
            let Some(at) = self.running.iter().position(|sequence| sequence.id == id) else { return false };
            if grow(&mut self.blocks, &mut self.running[at], len, self.limits.block_size) {
                return true;
            }
            let last = self.first_to_go(|_| true).unwrap_or(at);
            self.preempt(last, step, budget);
        }
    }

    /// Puts a running sequence back, and what the step had for it.
    fn preempt(&mut self, at: usize, step: &mut Vec<Scheduled>, budget: &mut usize) {
        let victim = self.running.remove(at);
        self.preemptions += 1;
        if let Some(at) = step.iter().position(|scheduled| scheduled.id == victim.id) {
            let len = step.remove(at).len;
            *budget += len;
            *self.served.entry(victim.role).or_default() -= len as u64;
        }
        self.put_back(victim);
    }

    /// Back into the queue, without its blocks.
    fn put_back(&mut self, mut sequence: Sequence) {
        release_all(&mut self.blocks, &sequence);
        sequence.blocks.clear();
        (sequence.computed, sequence.sealed) = (0, 0);
        sequence.chain = sequence.root;
        self.enqueue(sequence);
    }

    fn reuse_prefix(&mut self, sequence: &mut Sequence) {
        if !self.limits.prefix_caching {
            return;
        }
        let (blocks, chain) = self.blocks.find_prefix(sequence.chain, &sequence.tokens[..sequence.shareable()]);
        sequence.computed = blocks.len() * self.limits.block_size;
        sequence.sealed = blocks.len();
        (sequence.blocks, sequence.chain) = (blocks, chain);
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

/// Makes the blocks findable that are full of computed tokens.
fn seal(blocks: &mut BlockManager, sequence: &mut Sequence, limits: Limits) {
    let size = limits.block_size;
    while limits.prefix_caching && (sequence.sealed + 1) * size <= sequence.computed {
        let tokens = &sequence.tokens[sequence.sealed * size..(sequence.sealed + 1) * size];
        sequence.chain = blocks.seal(sequence.blocks[sequence.sealed], sequence.chain, tokens);
        sequence.sealed += 1;
    }
}

fn release_all(blocks: &mut BlockManager, sequence: &Sequence) {
    sequence.blocks.iter().rev().for_each(|id| blocks.release(*id));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "scheduler_tests.rs"]
mod tests;
