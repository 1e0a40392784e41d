//! The memory plan: what is estimated beside what is taken, and the refusals that come of it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rdpo::model::{Decoder, LoadOptions, TrainingMemory, TrainingSize, WeightFormat};
use rdpo::train::{LoraOptions, TokenPair, TrainJob, TrainingOptions, train};
use rdpo::weights::Checkpoint;
use serde_json::{Value, json};

use super::binary::{Server, command, settings};
use super::hot_swap::fixture;
use super::training::Listener;

/// What a run takes may be below the estimate, which is for the longest pairs, by this share of it; and above it by that one, for
/// what the allocator keeps and the kernels' scratch.
const BELOW: f64 = 0.35;
const ABOVE: f64 = 0.15;

const LENGTH: usize = 256;
const HIDDEN: usize = 256;
const INNER: usize = 1024;
const LAYERS: usize = 6;
const VOCABULARY: usize = 4096;

/// Large enough that a step's memory stands out from the process's own.
fn model(folder: &Path) -> Decoder {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
        "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "float32",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = HashMap::new();
    let mut put = |name: String, shape: &[usize]| {
        let count: usize = shape.iter().product();
        let data: Vec<f32> = (0..count).map(|at| ((at * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.1).collect();
        tensors.insert(name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap());
    };
    put("model.embed_tokens.weight".into(), &[VOCABULARY, HIDDEN]);
    put("model.norm.weight".into(), &[HIDDEN]);
    for layer in 0..LAYERS {
        let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
        put(at("input_layernorm"), &[HIDDEN]);
        put(at("post_attention_layernorm"), &[HIDDEN]);
        for (name, out, input) in [
            ("self_attn.q_proj", 256, HIDDEN),
            ("self_attn.k_proj", 128, HIDDEN),
            ("self_attn.v_proj", 128, HIDDEN),
            ("self_attn.o_proj", HIDDEN, 256),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ] {
            put(at(name), &[out, input]);
        }
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    let load = LoadOptions { device: Device::Cpu, weights: WeightFormat::Float(DType::F32) };
    Decoder::load(&Checkpoint::open(folder).unwrap(), &load).unwrap()
}

/// A line of `/proc/self/status`, bytes.
fn status(name: &str) -> usize {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}"));
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
}

/// Trains three steps with so much memory for graphs; the estimate, and what the process took beyond what it had.
fn trained(model: &Decoder, memory: &str) -> (TrainingMemory, usize) {
    let ids =
        |from: usize, len: usize| (from..from + len).map(|id| (id * 31 % VOCABULARY) as u32).collect::<Vec<u32>>();
    let pairs: Vec<TokenPair> = (0..6)
        .map(|index| TokenPair {
            prompt: ids(index, 8),
            chosen: ids(100 + index, LENGTH - 8),
            rejected: ids(900 + index, LENGTH - 8),
            reference_rejected: None,
            score_chosen: 1.0,
            score_rejected: 0.0,
        })
        .collect();
    let options = TrainingOptions {
        batch_size: 2,
        max_length: LENGTH,
        activation_memory: memory.to_owned(),
        ..TrainingOptions::default()
    };
    let lora = LoraOptions::default().config(None);
    let size = TrainingSize { max_length: LENGTH, batch_size: 2, keep_bytes: options.activation_bytes().unwrap() };
    let estimate = model.training_memory(&lora, &size);
    let folder = tempfile::tempdir().unwrap();
    let job = TrainJob {
        model,
        lora,
        init: None,
        pairs: &pairs,
        eval_pairs: &[],
        loss: Default::default(),
        options,
        seed: 1,
        folder: folder.path().to_path_buf(),
    };
    // Starts the peak anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    train(&job, &mut Listener::default()).unwrap();
    (estimate, status("VmHWM").saturating_sub(before))
}

/// Runs alone in a process of its own, where all memory is its own. Each size has a process: what one run leaves in the
/// allocator, the next one would not have to ask for.
#[test]
fn a_run_takes_what_was_estimated() {
    let name = "memory::a_run_takes_what_was_estimated";
    let Ok(memory) = std::env::var("RDPO_TEST_ALONE") else {
        for memory in ["1GiB", "20MiB", "0"] {
            let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
            let output = alone.args([name, "--exact", "--nocapture"]).env("RDPO_TEST_ALONE", memory).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && text.contains("1 passed"), "{text}{said}");
            print!("{said}");
        }
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let (estimate, taken) = trained(&model, &memory);
    // The copy is published after training.
    let expected = (estimate.total() - estimate.copy) as f64;
    eprintln!("activation_memory {memory}: taken {:.1} MB, estimated {:.1} MB", taken as f64 / 1e6, expected / 1e6);
    let ratio = taken as f64 / expected;
    assert!((1.0 - BELOW..=1.0 + ABOVE).contains(&ratio), "taken / estimated = {ratio:.2} of {estimate:?}");
}

/// The settings of a tiny server with lines of its own in `[device]` and `[kv_cache]`.
fn tight(folder: &Path, device: &str, cache: &str) -> std::path::PathBuf {
    let path = settings(folder, &fixture("tiny-llama"));
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace("memory = \"8MiB\"\n", &format!("{cache}\n"));
    fs::write(&path, format!("[device]\nkind = \"cpu\"\n{device}\n{text}")).unwrap();
    path
}

#[test]
fn settings_that_cannot_fit_are_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let said = |device: &str, cache: &str| {
        let output = command(&tight(folder.path(), device, cache)).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let text = said("memory = \"1.9MiB\"", "memory = \"1MiB\"");
    for part in [
        "do not fit",
        "1.0 MiB (kv_cache.memory = \"1MiB\")",
        "may use 1.9 MiB",
        "adapters.max_resident",
        "models.NAME.dtype",
    ] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    let text = said("memory = \"100kB\"", "memory = \"auto\"");
    assert!(text.contains("models") && text.contains("nothing is left for the key/value cache"), "{text}");
    let text = said("memory = \"some\"", "memory = \"auto\"");
    assert!(text.contains("device.memory") && text.contains("not a size"), "{text}");
    let text = said("", "memory = \"half\"");
    assert!(text.contains("kv_cache.memory") && text.contains("40%"), "{text}");
}

fn gauge(server: &Server, name: &str, kind: &str) -> usize {
    let (text, start) = (server.text("/metrics"), format!("{name}{{kind=\"{kind}\"}} "));
    let value = text.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("no {start}: {text}"));
    value.parse().unwrap()
}

fn job(max_length: usize) -> Value {
    let pair = json!({"prompt": "Number?", "chosen": "Yes, it is.", "rejected": "No.", "score_chosen": 2.0, "score_rejected": 1.0});
    json!({"pairs": [pair, pair], "lora": {"r": 4}, "training": {"max_length": max_length, "eval_fraction": 0.0}})
}

#[test]
fn a_job_that_cannot_fit_is_refused_before_it_starts() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(&tight(folder.path(), "memory = \"6MiB\"", "memory = \"512KiB\""));
    let log = folder.path().join("log");
    command.env("RUST_LOG", "info").stderr(fs::File::create(&log).unwrap());
    let server = Server::spawn(command);
    let plan = fs::read_to_string(&log).unwrap();
    for line in
        ["the server may use 6.0 MiB", "weights", "kv_cache.memory = \"512KiB\"", "adapters.max_resident", "left"]
    {
        assert!(plan.contains(line), "no `{line}` in {plan}");
    }
    let (status, reply) = server.try_submit(&job(1024));
    assert_eq!((status, &reply["error"]["code"]), (422, &json!("unprocessable")), "{reply}");
    assert_eq!(reply["error"]["param"], "training.activation_memory", "{reply}");
    let said = reply["error"]["message"].as_str().unwrap();
    for part in
        ["training.max_length (1024)", "lora.r (4)", "of the 6.0 MiB that the server may use", "kv_cache.memory"]
    {
        assert!(said.contains(part), "no `{part}` in {said}");
    }
    let fits = server.submit(&job(24));
    server.wait(&fits);

    let total = gauge(&server, "rdpo_gpu_memory_bytes", "total");
    assert!(gauge(&server, "rdpo_gpu_memory_bytes", "free") <= total);
    for kind in ["weights", "kv"] {
        let held = gauge(&server, "rdpo_gpu_memory_bytes", kind);
        assert!(held > 0 && held == gauge(&server, "rdpo_gpu_memory_planned_bytes", kind), "{kind}");
    }
    assert!(gauge(&server, "rdpo_gpu_memory_bytes", "adapter") > 0, "the job's adapter is resident");
    for kind in ["optimizer", "activation"] {
        assert_eq!(gauge(&server, "rdpo_gpu_memory_bytes", kind), 0, "given back when the job ends: {kind}");
        assert!(gauge(&server, "rdpo_gpu_memory_planned_bytes", kind) > 0, "{kind}");
    }
}
