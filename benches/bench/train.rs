//! Training tokens per second and peak memory of a whole run: 16 pairs cut from a text, two epochs, batch 4, rank 16.
//!
//! `cargo bench --bench bench -- train-run [name=value …]` prints one JSON line. Names, with what they are without:
//! `model=models/smollm2-135m-instruct device=cpu dtype=f32 memory=1GiB` (activations) `text=/usr/share/common-licenses/GPL-3 pairs=16`
//! `prompt=60 answer=100` (words) `epochs=2 batch=4 lr=1e-4 max_length=512 shuffle=true`, and for a comparison of curves `out=FOLDER`, which gets the
//! pairs as JSON lines, the adapter before and after as PEFT has it, and every step's metrics.
//!
//! Tokens are counted as TRL counts them (the prompt once for each answer), and the time includes the reference pass and the
//! checkpoint, as a user waits for both.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use candle_core::Device;
use rdpo::error::{Error, Result};
use rdpo::model::{Decoder, LoadOptions, ModelConfig, WeightFormat};
use rdpo::ops::device_peak;
use rdpo::text::{Message, RenderOptions, Tokenizer};
use rdpo::train::{
    EvalMetrics, Hooks, LoraOptions, LossKind, LossOptions, StepMetrics, TokenPair, TrainJob, Trainer, TrainingOptions,
    adapter_logprobs, train,
};
use rdpo::weights::{AdapterFile, Checkpoint};
use serde_json::json;

/// Shape of the pairs: how many, and words of prompt and answers.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) pairs: usize,
    pub(crate) prompt: usize,
    pub(crate) answer: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { pairs: 16, prompt: 60, answer: 100 }
    }
}

/// Keeps every step, and prints it to stderr.
#[derive(Default)]
struct Printer(Vec<StepMetrics>);

impl Hooks for Printer {
    fn pace(&mut self) -> Result<()> {
        Ok(())
    }

    fn on_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        eprintln!(
            "step {}/{}: loss {:.4}, margin {:.4}, {:.2} s",
            metrics.step, metrics.total_steps, metrics.loss, metrics.rewards_margins, metrics.seconds
        );
        self.0.push(metrics.clone());
        Ok(())
    }

    fn on_eval(&mut self, _metrics: &EvalMetrics) -> Result<()> {
        Ok(())
    }

    fn on_checkpoint(&mut self, _step: usize, _adapter: &AdapterFile) -> Result<()> {
        Ok(())
    }
}

/// The `name=value` arguments over their defaults.
struct Arguments(BTreeMap<&'static str, String>);

impl Arguments {
    fn read(given: &[String]) -> Result<Self> {
        let memory = TrainingOptions::default().activation_memory;
        let mut values: BTreeMap<&'static str, String> = [
            ("model", "models/smollm2-135m-instruct"),
            ("device", "cpu"),
            ("dtype", "f32"),
            ("memory", memory.as_str()),
            ("text", "/usr/share/common-licenses/GPL-3"),
            ("pairs", "16"),
            ("prompt", "60"),
            ("answer", "100"),
            ("epochs", "2"),
            ("batch", "4"),
            ("lr", "1e-4"),
            ("max_length", "512"),
            ("shuffle", "true"),
            ("out", ""),
        ]
        .map(|(name, value)| (name, value.to_owned()))
        .into();
        for argument in given {
            let slot = argument.split_once('=').and_then(|(name, value)| Some((values.get_mut(name)?, value)));
            let Some((slot, value)) = slot else {
                return Err(Error::invalid(argument, format!("`{argument}` is no name=value that is known here")));
            };
            value.clone_into(slot);
        }
        Ok(Arguments(values))
    }

    fn parse<T: std::str::FromStr>(&self, name: &str) -> Result<T> {
        self.0[name].parse().map_err(|_| Error::invalid(name, format!("`{}` is not a value for it", self.0[name])))
    }
}

/// Runs the measurement with the arguments after `train-run`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::read(arguments)?;
    let text = |name: &str| arguments.0[name].as_str();
    let dtype = text("dtype").parse()?;
    let words = std::fs::read_to_string(text("text"))?;
    let shape = Shape {
        pairs: arguments.parse("pairs")?,
        prompt: arguments.parse("prompt")?,
        answer: arguments.parse("answer")?,
    };
    let options = LoadOptions { device: super::device(text("device"))?, weights: dtype };
    let (model, pairs) = load_with(Path::new(text("model")), &options, &words, shape)?;
    let loaded = peak_megabytes();
    // Held by the driver's pool, and in tensors.
    let device_megabytes = || device_peak(model.device()).map(|bytes| bytes.map(|bytes| bytes >> 20));
    let device_loaded = device_megabytes();
    let folder = tempfile::tempdir()?;
    let epochs: f64 = arguments.parse("epochs")?;
    let job = TrainJob {
        model: &model,
        lora: LoraOptions::default().config(None),
        init: None,
        pairs: &pairs,
        eval_pairs: &[],
        loss: LossOptions { kind: LossKind::Dpo, ..LossOptions::default() },
        options: TrainingOptions {
            epochs,
            batch_size: arguments.parse("batch")?,
            learning_rate: arguments.parse("lr")?,
            warmup_ratio: 0.0,
            max_length: arguments.parse("max_length")?,
            shuffle: arguments.parse("shuffle")?,
            activation_memory: text("memory").to_owned(),
            ..TrainingOptions::default()
        },
        seed: 0,
        folder: folder.path().to_path_buf(),
    };
    let out = Some(Path::new(text("out"))).filter(|out| !out.as_os_str().is_empty());
    if let Some(out) = out {
        std::fs::create_dir_all(out)?;
        Trainer::open(&job)?.adapter()?.write(&out.join("init"))?;
        let lines = texts(&words, shape).map(|[prompt, chosen, rejected]| {
            json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}).to_string() + "\n"
        });
        std::fs::write(out.join("pairs.jsonl"), lines.collect::<String>())?;
    }
    let mut printer = Printer::default();
    let (start, before) = (Instant::now(), cpu_seconds());
    // As a job does, on a thread of the pool: from outside, each operation would be handed over.
    let outcome = rayon::scope(|_| train(&job, &mut printer))?;
    let seconds = start.elapsed().as_secs_f64();
    let last = outcome.last.ok_or_else(|| Error::internal("the run made no step."))?;
    if let Some(out) = out {
        outcome.adapter.write(&out.join("final"))?;
        let of = |pair: &TokenPair, answer: &[u32]| {
            adapter_logprobs(&model, &outcome.adapter, &pair.prompt, answer, &mut || Ok(()))
        };
        let logprobs = pairs
            .iter()
            .map(|pair| Ok([of(pair, &pair.chosen)?, of(pair, &pair.rejected)?]))
            .collect::<Result<Vec<_>>>()?;
        std::fs::write(out.join("run.json"), json!({"steps": printer.0, "logprobs": logprobs}).to_string())?;
    }
    let gflop = epochs * pairs.iter().map(|pair| gigaflop(model.config(), pair, 1.0 / epochs)).sum::<f64>();
    let line = json!({
        "dtype": text("dtype"), "pairs": pairs.len(), "seconds": seconds, "tokens": last.num_tokens,
        "tokens_saved": last.tokens_saved, "tokens_per_s": last.num_tokens as f64 / seconds,
        "gflop_per_s": gflop / seconds, "pairs_per_s": pairs.len() as f64 * epochs / seconds, "cpu_seconds": cpu_seconds().zip(before).map(|(after, before)| after - before), "peak_mb_loaded": loaded, "peak_mb": peak_megabytes(),
        "device_mb": device_megabytes(), "device_mb_loaded": device_loaded,
    });
    println!("{line}");
    Ok(())
}

/// What a pair needs in an epoch, 10⁹ FLOP, its prompt taken once for both answers: forward and the input's gradient of the frozen linears, three products of
/// the low-rank parts (rank 16), attention over the keys that are seen (its backward is 2.5 times its forward), the head for the answers; and
/// `references` forward passes. What is computed twice to save memory is not in it.
fn gigaflop(config: &ModelConfig, pair: &TokenPair, references: f64) -> f64 {
    let [prompt, chosen, rejected] = [&pair.prompt, &pair.chosen, &pair.rejected].map(|tokens| tokens.len() as f64);
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let heads = config.num_attention_heads * config.head_dim;
    let kv_heads = config.num_key_value_heads * config.head_dim;
    let sites = [(hidden, heads), (hidden, kv_heads), (hidden, kv_heads), (heads, hidden)];
    let sites = sites.into_iter().chain([(hidden, inner), (hidden, inner), (inner, hidden)]);
    let (linears, low) = sites.fold((0, 0), |(linears, low), (k, n)| (linears + k * n, low + 16 * (k + n)));
    let seen = |prefix: f64, own: f64| prefix * own + own * (own + 1.0) / 2.0;
    let seen = seen(0.0, prompt) + seen(prompt, chosen) + seen(prompt, rejected);
    let layers = config.num_hidden_layers as f64;
    let rows = prompt + chosen + rejected;
    let of_layers = (2.0 * (2.0 + references) * linears as f64 + 6.0 * low as f64) * rows;
    let of_attention = 4.0 * (3.5 + references) * heads as f64 * seen;
    let of_head = 2.0 * (2.0 + references) * (config.vocab_size * hidden) as f64 * (chosen + rejected);
    (layers * (of_layers + of_attention) + of_head) / 1e9
}

/// A checkpoint on the CPU, and pairs of its tokens.
pub(crate) fn load(path: &Path, weights: WeightFormat, text: &str, shape: Shape) -> Result<(Decoder, Vec<TokenPair>)> {
    load_with(path, &LoadOptions { device: Device::Cpu, weights }, text, shape)
}

fn load_with(path: &Path, options: &LoadOptions, text: &str, shape: Shape) -> Result<(Decoder, Vec<TokenPair>)> {
    let checkpoint = Checkpoint::open(path)?;
    let tokenizer = super::tokenizer(&checkpoint)?;
    let pairs = texts(text, shape).map(|texts| pair(&tokenizer, texts)).collect::<Result<_>>()?;
    Ok((Decoder::load(&checkpoint, options)?, pairs))
}

/// Prompt and two answers of each pair, each cut from another place.
fn texts(text: &str, shape: Shape) -> impl Iterator<Item = [String; 3]> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let piece = move |start: usize, len: usize| -> String {
        (start..start + len).map(|at| words[at % words.len()]).collect::<Vec<_>>().join(" ")
    };
    (0..shape.pairs).map(move |index| {
        [
            piece(index * 40, shape.prompt),
            piece(1000 + index * 90, shape.answer),
            piece(3000 + index * 90, shape.answer),
        ]
    })
}

fn pair(tokenizer: &Tokenizer, [prompt, chosen, rejected]: [String; 3]) -> Result<TokenPair> {
    let user = Message::new("user", prompt);
    let prompt = tokenizer.encode_chat(std::slice::from_ref(&user), &RenderOptions::default())?;
    let closed = RenderOptions { add_generation_prompt: false, ..RenderOptions::default() };
    let answer = |text: String| -> Result<Vec<u32>> {
        let whole = tokenizer.encode_chat(&[user.clone(), Message::new("assistant", text)], &closed)?;
        Ok(whole[prompt.len()..].to_vec())
    };
    let (chosen, rejected) = (answer(chosen)?, answer(rejected)?);
    Ok(TokenPair { prompt, chosen, rejected, reference_rejected: None, score_chosen: 1.0, score_rejected: 0.0 })
}

/// Peak resident memory of the process, MB.
fn peak_megabytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}

/// Processor time of the process, all threads, in seconds: what a run takes of a machine that others use too.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().map(|&at| fields.get(at)?.parse::<u64>().ok()).sum::<Option<u64>>()?;
    Some(ticks as f64 / 100.0)
}
