//! Speed of serving: `cargo bench --bench bench -- engine-run CHECKPOINT [NEW_TOKENS] [DTYPE] [BATCHES] [DEVICE] [PREFILL]` prints tokens
//! per second of decoding at batch 1, 8 and 32 (greedy, and sampled with a nucleus) and of reading one prompt of 512 tokens
//! (the median of three, warmed up).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Device;
use rdpo::engine::{
    Engine, EngineOptions, Event, EventStream, Gate, Request, SamplingParams, SpeculativeMethod, SpeculativeOptions,
    Task,
};
use rdpo::error::{Error, Result};
use rdpo::model::{Adapter, Decoder, LoadOptions, LoraParams, WeightFormat};
use rdpo::train::LoraOptions;
use rdpo::weights::Checkpoint;

const PROMPT_TOKENS: usize = 32;
const PREFILL_TOKENS: usize = 512;

pub(crate) fn start(path: &Path, weights: WeightFormat) -> Result<Engine> {
    Ok(start_with(path, weights, Arc::new(Gate::new(0.5)))?.0)
}

fn start_on(
    device: Device,
    path: &Path,
    weights: WeightFormat,
    gate: Arc<Gate>,
    prefill: usize,
) -> Result<(Engine, Arc<Decoder>)> {
    let checkpoint = Checkpoint::open(path)?;
    let model = Arc::new(Decoder::load(&checkpoint, &LoadOptions { device, weights })?);
    let tokenizer = super::tokenizer(&checkpoint)?;
    let options = EngineOptions {
        name: "bench".into(),
        block_size: 16,
        kv_memory_bytes: if model.device().is_cpu() { 1 << 30 } else { 8 << 30 },
        max_batch_tokens: prefill,
        max_sequences: 64,
        max_waiting: 64,
        max_model_len: None,
        prefix_caching: false,
        // Greedy answers of a fixed length end in repetition, which drafts would make look fast.
        speculative: SpeculativeOptions { method: SpeculativeMethod::None, ..SpeculativeOptions::default() },
    };
    Ok((Engine::start(model.clone(), Arc::new(tokenizer), gate, options)?, model))
}

/// An engine behind a gate, and its model.
pub(crate) fn start_with(path: &Path, weights: WeightFormat, gate: Arc<Gate>) -> Result<(Engine, Arc<Decoder>)> {
    start_on(Device::Cpu, path, weights, gate, PREFILL_TOKENS)
}

/// Arrival times of the tokens of one answer.
fn times(mut stream: EventStream) -> Result<Vec<Instant>> {
    let mut times = Vec::new();
    loop {
        match stream.blocking_recv() {
            Some(Event::Token { .. }) => times.push(Instant::now()),
            Some(Event::Done { .. }) => return Ok(times),
            Some(Event::Failed(error)) => return Err(error),
            Some(_) => {}
            None => return Err(Error::internal("the engine stopped")),
        }
    }
}

/// Arrival times of the tokens of `count` answers that run at once.
fn answers(
    engine: &Engine,
    adapters: &[Arc<Adapter>],
    count: usize,
    prompt_tokens: usize,
    params: &SamplingParams,
) -> Result<Vec<Vec<Instant>>> {
    let running = (0..count)
        .map(|index| {
            let prompt = (0..prompt_tokens).map(|at| 100 + (index * 7919 + at * 104_729) as u32 % 200).collect();
            let params = SamplingParams { seed: Some(index as u64), ..params.clone() };
            let adapter = (!adapters.is_empty()).then(|| adapters[index % adapters.len()].clone());
            let stream = engine.submit(Request { prompt, params, adapter, task: Task::Generate, role: "student" })?;
            Ok(std::thread::spawn(move || times(stream)))
        })
        .collect::<Result<Vec<_>>>()?;
    running.into_iter().map(|thread| thread.join().map_err(|_| Error::internal("a reader panicked"))?).collect()
}

/// Seconds between the tokens of each of `count` answers that run at once.
pub(crate) fn gaps(engine: &Engine, count: usize, prompt_tokens: usize, params: &SamplingParams) -> Result<Vec<f64>> {
    let answers = answers(engine, &[], count, prompt_tokens, params)?;
    Ok(answers.iter().flat_map(|times| times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64())).collect())
}

/// Runs `count` requests at once; `(time to the last first token, time from there to the end, tokens in that time)`.
pub(crate) fn measure(
    engine: &Engine,
    adapters: &[Arc<Adapter>],
    count: usize,
    prompt_tokens: usize,
    params: &SamplingParams,
) -> Result<(Duration, Duration, usize)> {
    let begin = Instant::now();
    let answers = answers(engine, adapters, count, prompt_tokens, params)?;
    let first = answers.iter().filter_map(|times| times.first()).max().copied().unwrap_or(begin);
    let last = answers.iter().filter_map(|times| times.last()).max().copied().unwrap_or(begin);
    let tokens = answers.iter().flatten().filter(|at| **at > first).count();
    Ok((first - begin, last - first, tokens))
}

/// How often [`run_adapters`] measures everything, a short while each: a machine that others share changes its speed within seconds.
const ROUNDS: usize = 35;

/// The command line after `engine-run`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let Some(path) = arguments.first() else {
        return Err(Error::invalid("CHECKPOINT", "a checkpoint folder or GGUF file is wanted"));
    };
    let new_tokens = match arguments.get(1) {
        Some(text) => text.parse().map_err(|_| Error::invalid("NEW_TOKENS", "must be a number"))?,
        None => 64,
    };
    let argument = |index: usize, default: &'static str| arguments.get(index).map_or(default, String::as_str);
    let device = super::device(argument(4, "cpu"))?;
    let prefill = match arguments.get(5) {
        Some(text) => text.parse().map_err(|_| Error::invalid("PREFILL", "must be a number"))?,
        None => PREFILL_TOKENS,
    };
    let gate = Arc::new(Gate::new(0.5));
    let (engine, _) = start_on(device, Path::new(path), argument(2, "auto").parse()?, gate, prefill)?;
    let greedy = SamplingParams {
        temperature: 0.0,
        max_tokens: Some(new_tokens),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let sampled = SamplingParams { temperature: 0.7, top_p: 0.9, ..greedy.clone() };
    measure(&engine, &[], 1, PROMPT_TOKENS, &greedy)?;
    let batches = batches(argument(3, "1,8,32"))?;
    for (name, params) in [("greedy", &greedy), ("top_p 0.9", &sampled)] {
        for batch in batches.iter().copied() {
            let (_, time, tokens) = measure(&engine, &[], batch, PROMPT_TOKENS, params)?;
            println!("decode, batch {batch:2}, {name:9}: {:8.1} tok/s", tokens as f64 / time.as_secs_f64());
        }
    }
    let one = SamplingParams { max_tokens: Some(1), ..greedy };
    // The first reading of that length warms up.
    measure(&engine, &[], 1, prefill, &one)?;
    let mut times = [Duration::ZERO; 3];
    for time in &mut times {
        *time = measure(&engine, &[], 1, prefill, &one)?.0;
    }
    times.sort_unstable();
    println!("prefill, {prefill} tokens:           {:8.1} tok/s", prefill as f64 / times[1].as_secs_f64());
    Ok(())
}

fn batches(text: &str) -> Result<Vec<usize>> {
    let batches = text.split(',').map(str::parse).collect::<std::result::Result<_, _>>();
    batches.map_err(|_| Error::invalid("BATCHES", "must be numbers with commas between"))
}

/// The command line after `lora-run`, `[DTYPE] [RANK] [BATCHES]`: what adapters cost, all rows having one, of one or of four in turn.
pub(crate) fn run_adapters(arguments: &[String]) -> Result<()> {
    let argument = |index: usize, default: &'static str| arguments.get(index).map_or(default, String::as_str);
    let batches = batches(argument(2, "1,8,32"))?;
    let rank = argument(1, "16").parse().map_err(|_| Error::invalid("RANK", "must be a number"))?;
    let path = Path::new("models/smollm2-135m-instruct");
    let (engine, model) = start_with(path, argument(0, "auto").parse()?, Arc::new(Gate::new(0.5)))?;
    let config = LoraOptions { r: rank, ..LoraOptions::default() }.config(None);
    let adapter = |seed| -> Result<Arc<Adapter>> {
        let file = LoraParams::new(&config, &model, seed)?.to_file()?;
        Ok(Arc::new(Adapter::from_file(&file, &model)?))
    };
    let adapters = (0..4).map(adapter).collect::<Result<Vec<_>>>()?;
    let params =
        SamplingParams { temperature: 0.0, max_tokens: Some(32), ignore_eos: true, ..SamplingParams::default() };
    measure(&engine, &adapters, 4, PROMPT_TOKENS, &params)?;
    for batch in batches {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let mut rates = [0.0; 3];
            for (count, rate) in [0, 1, 4].into_iter().zip(&mut rates) {
                let (_, time, tokens) = measure(&engine, &adapters[..count], batch, PROMPT_TOKENS, &params)?;
                *rate = tokens as f64 / time.as_secs_f64();
            }
            rounds.push(rates);
        }
        let median = |of: &dyn Fn(&[f64; 3]) -> f64| {
            let mut all: Vec<f64> = rounds.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[ROUNDS / 2]
        };
        let [base, one, four] = [0, 1, 2].map(|at| median(&|rates| rates[at]));
        // Beside the base of its own round: machines change their speed.
        let [of_one, of_four] = [1, 2].map(|at| 100.0 * (median(&|rates| rates[0] / rates[at]) - 1.0));
        println!(
            "batch {batch:2}: base {base:7.1} tok/s; rank {rank}: one adapter {one:7.1}, {of_one:+.1} % a row; four {four:7.1}, {of_four:+.1} %"
        );
    }
    Ok(())
}
