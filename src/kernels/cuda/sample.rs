//! What the sampling kernel is asked and what it answers, and the launch of `sample.cu`.

use candle_core::Result;

use super::launch::{Arg, Launch, Queue};

/// Words of a row's request, as `sample.cu` has them.
const WANTED: usize = 15;
/// Flags of a request, of a result and of an edit's id.
const DRAW: u32 = 1;
const GREEDY: u32 = 2;
const LOGPROBS: u32 = 4;
const EDITED: u32 = 8;
const TAKEN: u32 = 1;
const BROKEN: u32 = 2;
const SCALED: u32 = 1 << 31;
const BANNED: u32 = 1 << 30;
/// Words of a result before the `top`.
const RESULT: usize = 3;
/// Bins of a histogram, and numbers that the warps exchange, of 8 bytes.
const SHARED: usize = (2048 + 32) * 8;

/// What is asked of a row of logits.
#[derive(Clone, Debug, Default)]
pub struct SampleRow {
    /// The token to draw, where one is.
    pub pick: Option<Pick>,
    /// The log-probability of that token in the raw distribution.
    pub logprob: bool,
    /// How many of the most likely tokens of the raw distribution.
    pub top: usize,
    /// Tokens whose ranks and log-probabilities in the raw distribution are wanted.
    pub asked: Vec<u32>,
}

/// How a token is drawn; names and meaning are those of the engine's sampling parameters.
#[derive(Clone, Debug)]
pub struct Pick {
    /// None takes the most likely token.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// Of the logits that are [`Edit::scaled`].
    pub repetition_penalty: f32,
    /// The draw, in [0, 1), a multiple of 2^-53.
    pub uniform: f64,
    /// Changes of logits before anything else, one an id.
    pub edits: Vec<Edit>,
    /// Which tokens may come, a bit each, the lowest of a word first; all where there is none.
    pub mask: Option<Vec<u32>>,
}

/// What happens to a logit, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Edit {
    /// Whose.
    pub id: u32,
    /// By the repetition penalty.
    pub scaled: bool,
    /// What is subtracted.
    pub minus: f32,
    /// What is added.
    pub plus: f32,
    /// It may not come.
    pub banned: bool,
}

/// What a row of logits says.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Whether all logits are finite; nothing else holds where they are not.
    pub finite: bool,
    /// The drawn token.
    pub id: u32,
    /// Whether it may come: not where no token may.
    pub possible: bool,
    /// Its log-probability, nats, where that was asked.
    pub logprob: f32,
    /// `(id, log-probability)`, most likely first.
    pub top: Vec<(u32, f32)>,
    /// `(rank, log-probability)` in the order they were asked; the most likely has rank 1.
    pub asked: Vec<(u32, f32)>,
}

/// A step's requests in the words that the kernel reads.
#[derive(Debug)]
pub struct SamplePlan {
    /// To be uploaded; the kernel writes to them.
    pub words: Vec<u32>,
    /// Where each row's result begins, its `top` and its `asked`.
    rows: Vec<[usize; 3]>,
    /// Words of all results.
    pub results: usize,
}

impl SamplePlan {
    /// For logits of `v` numbers a row; an error where an id or a mask is not theirs.
    pub fn new(rows: &[SampleRow], v: usize) -> Result<Self> {
        let mut plan = SamplePlan { words: vec![0; WANTED * rows.len()], rows: Vec::new(), results: 0 };
        for (at, row) in rows.iter().enumerate() {
            let edits = row.pick.iter().flat_map(|pick| &pick.edits).map(|edit| edit.id);
            let fits = edits.chain(row.asked.iter().copied()).all(|id| (id as usize) < v && id < BANNED);
            let mask = row.pick.as_ref().and_then(|pick| pick.mask.as_ref());
            if !fits || mask.is_some_and(|mask| mask.len() != v.div_ceil(32)) {
                candle_core::bail!("a row asks for tokens beyond its {v}");
            }
            let wanted = plan.row(row, v);
            plan.words[WANTED * at..WANTED * (at + 1)].copy_from_slice(&wanted);
        }
        Ok(plan)
    }

    fn row(&mut self, row: &SampleRow, v: usize) -> [u32; WANTED] {
        let (top, result) = (row.top.min(v), self.results);
        self.rows.push([result, top, row.asked.len()]);
        self.results += RESULT + 2 * (top + row.asked.len());
        let mut wanted = [0; WANTED];
        let raw = row.logprob || top > 0 || !row.asked.is_empty();
        wanted[0] = if raw { LOGPROBS } else { 0 };
        wanted[11..].copy_from_slice(&[word(top), self.place(&row.asked), word(row.asked.len()), word(result)]);
        let Some(pick) = &row.pick else { return wanted };
        let edited = !pick.edits.is_empty() || pick.mask.is_some();
        wanted[0] |= DRAW | if edited { EDITED } else { 0 } | if pick.temperature.is_none() { GREEDY } else { 0 };
        wanted[1] = pick.temperature.unwrap_or(1.0).to_bits();
        wanted[2] = pick.top_p.to_bits();
        wanted[3] = pick.repetition_penalty.to_bits();
        wanted[4] = farthest(pick.min_p).to_bits();
        wanted[5] = if pick.top_k < v { word(pick.top_k) } else { 0 };
        let uniform = (pick.uniform * (1u64 << 53) as f64) as u64;
        [wanted[6], wanted[7]] = [uniform as u32, (uniform >> 32) as u32];
        let flags = |edit: &Edit| if edit.scaled { SCALED } else { 0 } | if edit.banned { BANNED } else { 0 };
        let edit = |edit: &Edit| [edit.id | flags(edit), edit.minus.to_bits(), edit.plus.to_bits()];
        [wanted[8], wanted[9]] =
            [self.place(&pick.edits.iter().flat_map(edit).collect::<Vec<_>>()), word(pick.edits.len())];
        wanted[10] = pick.mask.as_ref().map_or(0, |mask| self.place(mask));
        wanted
    }

    /// Where the words begin now.
    fn place(&mut self, words: &[u32]) -> u32 {
        let at = word(self.words.len());
        self.words.extend_from_slice(words);
        at
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// What the kernel wrote, [`SamplePlan::results`] words, row by row.
    pub fn read(&self, results: &[u32]) -> Vec<Sampled> {
        let row = |[at, top, asked]: &[usize; 3]| {
            let (head, rest) = results[*at..at + RESULT + 2 * (top + asked)].split_at(RESULT);
            let (tops, asked) = rest.split_at(2 * top);
            if head[1] & BROKEN != 0 {
                // The rest was not written.
                let asked = vec![(0, f32::NAN); asked.len() / 2];
                return Sampled { finite: false, id: 0, possible: false, logprob: f32::NAN, top: Vec::new(), asked };
            }
            let pairs = |words: &[u32]| words.chunks_exact(2).map(|pair| (pair[0], f32::from_bits(pair[1]))).collect();
            Sampled {
                finite: true,
                id: head[0],
                possible: head[1] & TAKEN != 0,
                logprob: f32::from_bits(head[2]),
                top: pairs(tops),
                asked: pairs(asked),
            }
        };
        self.rows.iter().map(row).collect()
    }
}

fn word(value: usize) -> u32 {
    u32::try_from(value).expect("a size of one step fits 32 bits. This is a bug.")
}

/// The largest distance from the largest logit, over the temperature, whose weight `exp(-distance)` is at least `min_p`.
fn farthest(min_p: f32) -> f32 {
    let enough = |bits: u32| f64::from(-f32::from_bits(bits)).exp() >= f64::from(min_p);
    // Bits order as the numbers do.
    let (mut least, mut most) = (0, f32::MAX.to_bits());
    while least < most {
        let middle = least + (most - least).div_ceil(2);
        match enough(middle) {
            true => least = middle,
            false => most = middle - 1,
        }
    }
    f32::from_bits(least)
}

/// # Safety
/// As [`Queue::launch`]: logits: (rows, v), f32, changed in place; words and results of a [`SamplePlan`] of these rows, whose words are
/// changed too.
pub(super) unsafe fn sample(
    queue: &impl Queue,
    (rows, v): (usize, usize),
    [logits, words, results]: [u64; 3],
) -> Result<()> {
    // As many as a block may have, but for vocabularies that no model has.
    let threads = (v / 16).next_power_of_two().clamp(64, 1024);
    let args = vec![Arg::At(logits), Arg::int(v), Arg::At(words), Arg::At(results)];
    let launch = Launch { kernel: "sample_rows".into(), grid: [rows, 1, 1], threads, shared: SHARED, args };
    // SAFETY: the caller's.
    unsafe { queue.launch(launch) }
}
