//! Configurations as the hubs' files spell them.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

fn read(config: &Value) -> ModelConfig {
    ModelConfig::from_json(config).unwrap()
}

fn with(config: &Value, changes: Value) -> Value {
    let mut config = config.clone();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn refused(config: &Value) -> String {
    let error = ModelConfig::from_json(config).unwrap_err();
    assert_eq!(error.status(), 422);
    error.param.unwrap()
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    })
}

#[test]
fn llama_in_the_old_and_the_new_spelling() {
    let old = read(&llama());
    assert_eq!((old.architecture, old.head_dim, old.tie_word_embeddings), (Architecture::Llama, 64, true));
    assert_eq!(
        (old.qkv_bias, old.o_bias, old.qk_norm, old.gemma_norms, old.num_labels),
        (false, false, false, false, 0)
    );
    assert_eq!((old.rope_theta, old.attention_scale), (5e5, 0.125));
    let scaling =
        RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    assert_eq!(old.rope_scaling, Some(scaling));

    let mut new = with(&llama(), json!({"rope_theta": null, "rope_scaling": null}));
    new["rope_parameters"] = llama()["rope_scaling"].clone();
    new["rope_parameters"]["rope_theta"] = json!(500000.0);
    assert_eq!(read(&new), old);
    // Both, of one mind; and a scaling that was put beside the new spelling.
    let both = with(&new, json!({"rope_scaling": llama()["rope_scaling"]}));
    assert_eq!(read(&both), old);
    assert_eq!(refused(&with(&new, json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))), "rope_scaling");
}

#[test]
fn optional_llama_keys_have_transformers_defaults() {
    let mut config = llama();
    for key in
        ["num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "rms_norm_eps", "hidden_act"]
    {
        config.as_object_mut().unwrap().remove(key);
    }
    let config = read(&config);
    assert_eq!((config.num_key_value_heads, config.rope_theta, config.rope_scaling), (32, 1e4, None));
    assert_eq!((config.tie_word_embeddings, config.rms_norm_eps, config.activation), (false, 1e-6, Activation::Silu));
    let biased = read(&with(&llama(), json!({"attention_bias": true})));
    assert!(biased.qkv_bias && biased.o_bias);
    let by_type = with(&llama(), json!({"architectures": null}));
    assert_eq!(read(&by_type), read(&llama()));
}

#[test]
fn windows_of_each_family() {
    let mistral = with(&llama(), json!({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}));
    let config = read(&mistral);
    assert_eq!((config.architecture, config.sliding_window), (Architecture::Llama, Some(4096)));
    assert_eq!(config.is_sliding, [true; 4]);
    assert_eq!(read(&with(&mistral, json!({"sliding_window": null}))).sliding_window, None);
    // Ministral's layers differ.
    let listed = json!(["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]);
    assert_eq!(read(&with(&mistral, json!({"layer_types": listed}))).is_sliding, [false, true, true, true]);
    // A Llama has no window whatever its file says.
    assert_eq!(read(&with(&llama(), json!({"sliding_window": 16}))).sliding_window, None);

    let qwen = with(
        &llama(),
        json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "use_sliding_window": false, "max_window_layers": 3}),
    );
    let config = read(&qwen);
    assert_eq!((config.architecture, config.qkv_bias, config.o_bias), (Architecture::Qwen2, true, false));
    assert_eq!((config.sliding_window, config.is_sliding), (None, vec![false; 4]));
    let config = read(&with(&qwen, json!({"use_sliding_window": true})));
    assert_eq!((config.sliding_window, config.is_sliding), (Some(32), vec![false, false, false, true]));
    let listed = json!(["sliding_attention", "full_attention", "full_attention", "full_attention"]);
    let config = read(&with(&qwen, json!({"use_sliding_window": true, "layer_types": listed})));
    assert_eq!(config.is_sliding, [true, false, false, false]);
}

#[test]
fn qwen3_has_normed_heads_of_their_own_width() {
    let config = with(&llama(), json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "rope_scaling": null}));
    let config = read(&config);
    assert!(config.qk_norm && !config.qkv_bias);
    assert_eq!(config.head_dim, 128);
}

#[test]
fn gemma3_text_and_the_text_part_of_gemma3() {
    let text = json!({
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "sliding_window_pattern": 3,
    });
    let config = read(&json!({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}));
    assert_eq!((config.vocab_size, config.num_attention_heads, config.num_key_value_heads), (262_208, 8, 4));
    assert_eq!((config.head_dim, config.attention_scale, config.activation), (256, 0.0625, Activation::GeluTanh));
    assert_eq!((config.rope_theta, config.rope_local_theta), (1e6, Some(1e4)));
    assert_eq!(config.rope_scaling, Some(RopeScaling::Linear { factor: 8.0 }));
    assert_eq!(config.is_sliding, [true, true, false, true, true, false, true, true]);
    assert!(config.gemma_norms && config.qk_norm && config.tie_word_embeddings);

    let mut new = text;
    new["architectures"] = json!(["Gemma3ForCausalLM"]);
    new["rope_scaling"] = Value::Null;
    new["rope_parameters"] = json!({
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    });
    assert_eq!(read(&new), config);
    // A base that the new spelling leaves out is the old one's.
    new["rope_parameters"]["full_attention"]["rope_theta"] = Value::Null;
    new["rope_theta"] = json!(5e5);
    assert_eq!(read(&new).rope_theta, 5e5);
}

#[test]
fn classifiers_count_their_labels() {
    let config = with(&llama(), json!({"architectures": ["LlamaForSequenceClassification"]}));
    assert_eq!(read(&config).num_labels, 2);
    assert_eq!(read(&with(&config, json!({"id2label": {"0": "LABEL_0"}}))).num_labels, 1);
    assert_eq!(read(&with(&config, json!({"num_labels": 1}))).num_labels, 1);
}

#[test]
fn what_cannot_be_honoured_names_its_key() {
    let key = |changes: Value| refused(&with(&llama(), changes));
    assert_eq!(key(json!({"architectures": ["MixtralForCausalLM"]})), "architectures");
    assert_eq!(key(json!({"architectures": ["LlamaForTokenClassification"]})), "architectures");
    assert_eq!(key(json!({"architectures": null, "model_type": "phi"})), "model_type");
    assert_eq!(key(json!({"architectures": null, "model_type": null})), "architectures");
    assert_eq!(key(json!({"hidden_size": null})), "hidden_size");
    assert_eq!(key(json!({"hidden_size": -1})), "hidden_size");
    assert_eq!(key(json!({"hidden_size": "2048"})), "hidden_size");
    assert_eq!(key(json!({"num_attention_heads": 0})), "num_attention_heads");
    assert_eq!(key(json!({"num_key_value_heads": 5})), "num_key_value_heads");
    assert_eq!(key(json!({"head_dim": 63})), "head_dim");
    assert_eq!(key(json!({"hidden_act": "relu"})), "hidden_act");
    assert_eq!(key(json!({"mlp_bias": true})), "mlp_bias");
    assert_eq!(key(json!({"partial_rotary_factor": 0.5})), "partial_rotary_factor");
    assert_eq!(key(json!({"quantization_config": {"quant_method": "gptq"}})), "quantization_config");
    assert_eq!(key(json!({"final_logit_softcapping": 30.0})), "final_logit_softcapping");
    assert_eq!(key(json!({"rope_scaling": {"type": "yarn", "factor": 4.0}})), "rope_scaling.type");
    assert_eq!(key(json!({"rope_scaling": {"rope_type": "linear"}})), "rope_scaling.factor");
    assert_eq!(key(json!({"rope_parameters": {"rope_type": "dynamic"}})), "rope_parameters.rope_type");
    let qwen = json!({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": true, "sliding_window": 8});
    let qwen = with(&llama(), qwen);
    assert_eq!(refused(&with(&qwen, json!({"layer_types": ["sliding_attention"]}))), "layer_types");
    assert_eq!(
        refused(&with(
            &qwen,
            json!({"layer_types": ["linear_attention", "linear_attention", "linear_attention", "linear_attention"]})
        )),
        "layer_types"
    );
}
