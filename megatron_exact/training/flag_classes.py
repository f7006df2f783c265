"""Every flag of Megatron's parser, and what a training job here makes of it: one table.

Three classes:

supported
    the flag does what Megatron documents; `shown_by` names the test that would fail if it did not.
inert
    the job would be the same without the flag; it is accepted, and logged once at the start.
refused
    not supported: it would break document masking, the weights, the records or the verified checkpoints, or
    it was never run with packed rows.

`read_flags` needs neither Megatron nor torch: the table says how many values each flag takes. So a job and
a preflight report most errors within a second. A test walks Megatron's own parser: a flag that a new
version brings, drops or spells otherwise fails there until it stands here.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_exact.command_line import ToolParser

Kind = Literal["supported", "inert", "refused"]

EFFECTS = "tests/distributed/test_flag_effects.py"
LAYOUTS = "tests/distributed/layout_matrix.py"

# How the table is written. A word is a flag without its dashes, with other spellings after a slash. What
# follows "=" are its values: count (1 or more), int (0 or more), number (finite, 0 or more), share (0 to
# 1), text, or choices (a|b, or a| for one); nothing is one value of any kind. A "+", "*" or "3" at the
# end says how many.
SUPPORTED: tuple[tuple[str, str], ...] = (
    (
        LAYOUTS,
        """
        tensor-model-parallel-size=count pipeline-model-parallel-size=count context-parallel-size=count
        sequence-parallel micro-batch-size=count num-layers-per-virtual-pipeline-stage=count
        use-distributed-optimizer overlap-grad-reduce overlap-param-gather ddp-bucket-size=count
        recompute-granularity=full|selective recompute-method=uniform|block recompute-num-layers=count
        pretrained-checkpoint=text save=text save-interval/persistent-save-interval=count bf16
        init-method-std=number adam-eps=number
        """,
    ),
    (
        "tests/distributed/jobs.py",
        """
        num-layers=count hidden-size=count ffn-hidden-size=count num-attention-heads=count
        group-query-attention num-query-groups=count swiglu disable-bias-linear vocab-size=count
        global-batch-size=count lr=number train-iters=count log-interval=count eval-iters=int
        """,
    ),
    (
        "tests/distributed/test_layouts.py",
        "decoder-first-pipeline-num-layers=count pipeline-model-parallel-layout=text",
    ),
    ("tests/distributed/test_throughput.py", "num-virtual-stages-per-pipeline-rank=count log-throughput"),
    ("tests/distributed/test_bad_input.py", "seq-length=count tokenizer-model=text"),
    ("tests/cuda/test_transformer_engine.py", "fp8-format=e4m3|hybrid fp8-recipe=tensorwise|"),
    ("tests/distributed/test_faults.py", "exit-signal-handler exit-signal=text"),
    ("tests/distributed/test_checkpoints.py", "finetune load=text async-save no-load-optim"),
    (
        EFFECTS,
        """
        max-position-embeddings=count kv-channels=count norm-epsilon=number add-qkv-bias qk-layernorm
        position-embedding-type=rope|learned_absolute|none use-rotary-position-embeddings rotary-base=count
        rotary-percent=share no-rope-freq=text
        use-rope-scaling rope-scaling-factor=number untie-embeddings-and-output-weights
        embedding-init-method-std=number hidden-dropout=share
        decoder-last-pipeline-num-layers=count account-for-embedding-in-pipeline-split
        account-for-loss-in-pipeline-split microbatch-group-size-per-virtual-pipeline-stage=count
        no-overlap-p2p-communication ddp-num-buckets=count recompute-activations
        recompute-modules=core_attn|mlp+
        fp16 loss-scale=number initial-loss-scale=number min-loss-scale=number loss-scale-window=number
        hysteresis=int grad-reduce-in-bf16 accumulate-allreduce-grads-in-fp32
        min-lr=number decoupled-lr=number decoupled-min-lr=number optimizer=adam|sgd weight-decay=number
        clip-grad=number adam-beta1=share adam-beta2=share sgd-momentum=share start-weight-decay=number
        end-weight-decay=number weight-decay-incr-style=constant|linear|cosine iterations-to-skip=count+
        lr-decay-style=constant|linear|cosine|inverse-square-root|WSD
        lr-wsd-decay-style=exponential|linear|cosine|minus_sqrt lr-decay-iters=count lr-decay-samples=count
        lr-wsd-decay-iters=count lr-wsd-decay-samples=count lr-warmup-fraction=share lr-warmup-iters=int
        lr-warmup-samples=int lr-warmup-init=number
        override-opt_param-scheduler/override-opt-param-scheduler
        use-checkpoint-opt_param-scheduler/use-checkpoint-opt-param-scheduler
        train-samples=count exit-interval=count exit-duration-in-mins=count manual-gc manual-gc-interval=int
        no-manual-gc-eval/disable-manual-gc-eval seed=count empty-unused-memory-level=0|1|2
        ckpt-step=int no-load-rng no-save-optim no-save-rng no-ckpt-fully-parallel-save
        ckpt-fully-parallel-load
        log-params-norm log-num-zeros-in-grad timing-log-level=0|1|2 timing-log-option=max|minmax|all
        tensorboard-dir=text tensorboard-log-interval=count log-timers-to-tensorboard
        no-log-loss-scale-to-tensorboard/disable-log-loss-scale-to-tensorboard
        log-validation-ppl-to-tensorboard log-world-size-to-tensorboard log-progress
        wandb-project=text wandb-exp-name=text wandb-save-dir=text wandb-entity=text
        profile use-pytorch-profiler profile-step-start=int profile-step-end=int profile-ranks=int+
        pytorch-profiler-collect-shapes pytorch-profiler-collect-callstack
        eval-interval=count start-eval-at-iter=int
        distributed-backend=nccl|gloo distributed-timeout-minutes=count
        transformer-impl=local|transformer_engine attention-backend=auto|flash|fused num-workers=int
        no-gradient-accumulation-fusion no-rope-fusion no-bias-swiglu-fusion no-bias-dropout-fusion
        use-cpu-initialization
        """,
    ),
)
"""Test that shows the effect, and the flags."""

INERT: tuple[tuple[str, str], ...] = (
    (
        "always on",
        """
        calculate-per-token-loss dataloader-inter-document-masking exit-on-missing-checkpoint
        verify-integrity
        """,
    ),
    (
        "decided here",
        """
        make-vocab-size-divisible-by= dist-ckpt-strictness=
        use-persistent-ckpt-worker async-strategy=
        """,
    ),
    (
        "the pack has the tokens, and its tokenizer",
        """
        split= vocab-file= merge-file= tokenizer-type= tokenizer-metadata= tokenizer-special-tokens=+
        tiktoken-pattern= tiktoken-num-special-tokens= tokenizer-sentencepiece-legacy
        no-tokenizer-sentencepiece-ignore-extra-whitespaces/disable-tokenizer-sentencepiece-ignore-extra-whitespaces
        tokenizer-hf-no-use-fast tokenizer-hf-no-include-special-tokens null-tokenizer-eod-id=
        null-tokenizer-pad-id= chat-template=
        """,
    ),
    (
        "it belongs to Megatron's own datasets",
        """
        dataloader-fast-cache-load dataloader-defer-npy-index-mmap data-cache-path= no-mmap-bin-files
        no-create-attention-mask-in-dataloader num-dataset-builder-threads= mid-level-dataset-surplus=
        """,
    ),
    (
        "Megatron itself does not read it any more",
        """
        use-mcore-models use-flash-attn use-dist-ckpt dist-ckpt-format= ckpt-fully-parallel-save disable-msc
        bert-no-binary-head onnx-safe=
        """,
    ),
    (
        "it belongs to modules that are replaced here",
        """
        no-masked-softmax-fusion no-bias-gelu-fusion no-persist-layer-norm attention-softmax-in-fp32
        """,
    ),
    (
        "nothing is sent to NVIDIA's one-logger",
        """
        no-one-logger one-logger-project= one-logger-run-name= one-logger-async app-tag-run-name=
        app-tag-run-version=
        """,
    ),
)
"""Reason why the job is the same without the flags, and the flags."""

REFUSED: tuple[tuple[str, str], ...] = (
    (
        "not checked with packed rows",
        """
        tensor-parallel-num-weight-shards= deterministic-mode step-batch-size-schedule=
        decrease-batch-size-if-needed te-rng-tracker
        """,
    ),
    (
        "never run with packed rows",
        """
        pipeline-model-parallel-comm-backend= delay-wgrad-compute use-ring-exchange-p2p
        defer-embedding-wgrad-compute wgrad-deferral-limit= overlap-p2p-communication-warmup-flush
        flash-attention-version= disable-bf16-reduced-precision-matmul fused-residual-rmsnorm
        use-transformer-engine-op-fuser
        no-clone-scatter-output-in-embedding/disable-clone-scatter-output-in-embedding
        use-te-activation-func disable-jit-fuser enable-experimental
        """,
    ),
    (
        "the attention of packed rows gathers keys and values in one step, whatever it says",
        """
        hierarchical-context-parallel-sizes=+ cp-comm-type=+
        """,
    ),
    (
        "the rows of a pack have one length",
        """
        max-seqlen-per-dp-cp-rank= hybrid-context-parallel
        """,
    ),
    (
        "mixture-of-experts models are not supported",
        """
        expert-model-parallel-size= expert-tensor-parallel-size=
        expert-tensor-parallel-num-weight-shards= overlap-moe-expert-parallel-comm
        overlap-dispatch-backward-with-experts-wgrad ep-overlap-early-attn-memory-release
        high-priority-a2a-comm-stream moe-shared-expert-intermediate-size= moe-shared-expert-gate
        moe-shared-expert-overlap use-grouped-gemm-for-shared-expert
        moe-shared-expert-glu-interleave-size= moe-ffn-hidden-size= moe-router-topk=
        moe-enable-routing-replay moe-router-padding-for-quantization moe-router-padding-for-fp8
        moe-router-num-groups= moe-router-group-topk= moe-router-pre-softmax
        moe-router-topk-scaling-factor= moe-router-score-function= moe-router-dtype=
        moe-router-enable-expert-bias moe-router-bias-update-rate=
        moe-router-quantile-balancing-ema= moe-router-force-load-balancing moe-router-force-biased=
        use-grouped-gemm-for-dense-mlp moe-grouped-gemm moe-single-grouped-weight
        moe-single-grouped-bias moe-z-loss-coeff= moe-input-jitter-eps= moe-token-dispatcher-type=
        moe-enable-deepep moe-flex-dispatcher-backend= moe-permute-fusion-into-hybridep
        moe-hybridep-pad-uneven-dispatch-inputs moe-per-layer-logging moe-expert-capacity-factor=
        moe-pad-expert-input-to-capacity moe-pad-experts-for-cuda-graph-inference
        moe-token-drop-policy= moe-layer-recompute moe-permute-fusion moe-router-fusion
        moe-apply-probs-on-input moe-latent-size= moe-flex-dispatcher-num-sms= moe-deepep-num-sms=
        moe-hybridep-num-sms= moe-hybridep-num-blocks-permute= moe-hybridep-num-blocks-unpermute=
        moe-hybridep-num-sms-preprocessing= moe-ncclep-static-shape moe-ncclep-zero-copy
        moe-mlp-glu-interleave-size= moe-expert-rank-capacity-factor= moe-paged-stash
        moe-paged-stash-page-size= moe-paged-stash-buffer-size-factor-cuda=
        moe-paged-stash-buffer-size-factor-cpu= save-tokens-per-expert-interval= num-experts=
        moe-layer-freq= moe-use-upcycling moe-router-load-balancing-type=+ moe-aux-loss-coeff=+
        moe-upcycling-granularity= moe-routing-trace-path= moe-routing-trace-max-training-iters=
        moe-routing-trace-capture-logits moe-routing-trace-capture-hidden-states
        moe-routing-trace-dump-weights
        """,
    ),
    (
        "weights would not be those of the seed: arms could not be paired",
        """
        no-initialization data-parallel-random-init init-method-xavier-uniform
        """,
    ),
    (
        "its buffers are shared between cards over NVLink, and no machine with such cards was available",
        """
        tp-comm-overlap no-tp-comm-bulk-wgrad/disable-tp-comm-bulk-wgrad
        no-tp-comm-bulk-dgrad/disable-tp-comm-bulk-dgrad
        no-tp-comm-overlap-ag/disable-tp-comm-overlap-ag
        no-tp-comm-overlap-rs/disable-tp-comm-overlap-rs tp-comm-overlap-rs-dgrad
        no-tp-comm-split-ag/disable-tp-comm-split-ag no-tp-comm-split-rs/disable-tp-comm-split-rs
        tp-comm-bootstrap-backend= tp-comm-overlap-cfg=
        """,
    ),
    (
        "choose --loss-head: the fused cross-entropy of Megatron gives other numbers",
        """
        cross-entropy-loss-fusion cross-entropy-fusion-impl= fp16-lm-cross-entropy
        """,
    ),
    (
        "multi-token prediction would bypass the token weights",
        """
        mtp-standalone mtp-num-layers= mtp-loss-scaling-factor= mtp-use-repeated-layer
        mtp-detach-heads mtp-hybrid-override-pattern=
        """,
    ),
    (
        "offloading was never run here",
        """
        cpu-offloading-num-layers= cpu-offloading-retain-pinned-cpu-buffers
        fine-grained-activation-offloading offload-modules=+ min-offloaded-tensor-size=
        delta-offload-bytes-across-pp-ranks= activation-offload-fraction=
        fine-grained-offloading-max-inflight-offloads=
        """,
    ),
    (
        "its states in main memory have another form in checkpoints, which was not resumed here: share "
        "them among more ranks (--use-distributed-optimizer)",
        """
        optimizer-cpu-offload optimizer-offload-fraction= use-torch-optimizer-for-cpu-offload
        overlap-cpu-optimizer-d2h-h2d no-pin-cpu-grads no-pin-cpu-params
        """,
    ),
    (
        "no supported model family has it",
        """
        softmax-type= fp32-residual-connection apply-residual-connection-post-layernorm
        apply-layernorm-1p glu-linear-offset= activation-func-clamp-value= rotary-interleaved
        qk-l2-norm qk-clip qk-clip-alpha= qk-clip-threshold= attention-output-gate
        use-mup mup-width-mult= mup-base-hidden-size= mup-embedding-mult= mup-output-mult=
        mup-base-head-dim= mup-attn-scale-power= apply-query-key-layer-scaling
        use-fused-weighted-squared-relu mrope-section=+
        yarn-original-max-position-embeddings= yarn-beta-fast= yarn-beta-slow=
        yarn-correction-range-round-to-int no-yarn-correction-range-round-to-int
        relative-attention-num-buckets= relative-attention-max-distance=
        rotary-seq-len-interpolation-factor= no-position-embedding openai-gelu
        squared-relu quick-geglu apply-wd-to-qk-layernorm no-weight-decay-cond-type= rope-type=
        freeze-all-layers
        """,
    ),
    (
        "multi-latent attention is not supported",
        """
        multi-latent-attention q-lora-rank= kv-lora-rank= qk-head-dim= qk-pos-emb-head-dim=
        v-head-dim= rotary-scaling-factor= mscale= mscale-all-dim= cache-mla-latents
        mla-down-proj-fusion
        """,
    ),
    (
        "the layers are those of the supported model families",
        """
        experimental-attention-variant= dsa-indexer-n-heads= dsa-indexer-head-dim= dsa-indexer-topk=
        dsa-indexer-topk-freq= dsa-indexer-skip-topk-offset= dsa-indexer-loss-coeff=
        dsa-indexer-use-sparse-loss dsa-kernel-backend= dsa-indexer-rope-interleaved
        no-dsa-indexer-rotate-activation/disable-dsa-indexer-rotate-activation
        no-dsa-indexer-scoring-relu/disable-dsa-indexer-scoring-relu dsa-indexer-k-norm-epsilon=
        dsa-indexer-k-norm-fp32 linear-conv-kernel-dim= linear-key-head-dim= linear-value-head-dim=
        linear-num-key-heads= linear-num-value-heads= is-hybrid-model mamba-state-dim=
        mamba-head-dim= mamba-num-groups= mamba-num-heads= disable-mamba-mem-eff-path
        mlp-chunks-for-prefill= mlp-chunks-for-training= mamba-training-ssm-states-dtype=
        linear-attention-freq= heterogeneous-layers-config-path=
        heterogeneous-layers-config-encoded-json= mamba-inference-conv-states-dtype=
        mamba-inference-ssm-states-dtype= spec=* hybrid-layer-pattern= hybrid-override-pattern=
        """,
    ),
    (
        "FSDP was not checked with packed rows",
        """
        init-model-with-meta-device no-strict-fsdp-dtensor-load/disable-strict-fsdp-dtensor-load
        use-megatron-fsdp use-torch-fsdp2 fsdp-manual-registration create-all-gather-group
        data-parallel-sharding-strategy= outer-dp-sharding-strategy= fsdp-double-buffer
        suggested-communication-unit-size= enable-full-sharding-in-hsdp
        torch-fsdp2-no-reshard-after-forward megatron-fsdp-main-params-dtype=
        megatron-fsdp-main-grads-dtype= megatron-fsdp-grad-comm-dtype=
        megatron-fsdp-enable-fine-grained-param-gather megatron-fsdp-max-pool-double-buffer
        fsdp-db-use-persist-buf-on-alloc-fail
        """,
    ),
    (
        "it does not work with sequence parallelism in Megatron 0.19.2",
        """
        distribute-saved-activations
        """,
    ),
    (
        "it belongs to delayed scaling, whose scales cannot be resumed: choose --fp8-recipe tensorwise",
        """
        fp8-margin= fp8-interval= fp8-amax-history-len= fp8-amax-compute-algo=
        no-fp8-wgrad/disable-fp8-wgrad
        """,
    ),
    (
        "weights stay in bf16, as checkpoints, exports and the check for finite weights read them",
        """
        fp8-param-gather keep-fp8-transpose-cache reuse-grad-buf-for-mxfp8-param-ag
        """,
    ),
    (
        "the loss head multiplies in bf16, a tile at a time",
        """
        fp8-output-proj
        """,
    ),
    (
        "with --fp8-format all layers multiply in 8 bits: a mixture of layers was not rehearsed",
        """
        first-last-layers-bf16 num-layers-at-start-in-bf16= num-layers-at-end-in-bf16=
        te-precision-config-file=
        """,
    ),
    (
        "other quantizers than Transformer Engine's were not rehearsed: choose --fp8-recipe tensorwise",
        """
        fp8-quantizer-factory= use-kitchen-attention kitchen-attention-backend=
        """,
    ),
    (
        "an H100 does not multiply in 4 bits",
        """
        fp4-format= fp4-recipe= fp4-quantizer-factory= fp4-param-gather
        """,
    ),
    (
        "a CUDA graph repeats a layer with the shapes and numbers of its capture, but the boundaries of "
        "packed rows and their longest segment change with every micro-batch",
        """
        enable-cuda-graph cuda-graph-warmup-steps= external-cuda-graph cuda-graph-impl=
        delay-offload-until-cuda-graph optimizer-cuda-graph cuda-graph-scope=+ cuda-graph-modules=+
        """,
    ),
    (
        "it belongs to inference",
        """
        inference-cuda-graph-scope= flash-decode batch-invariant-mode symmetric-ar-type=
        nccl-all-reduce-for-prefill inference-fuse-tp-communication
        inference-disable-triton-nvls-kernels inference-grouped-gemm-backend=
        inference-moe-disable-fused-quant-kernels inference-moe-token-dispatcher-type=
        inference-rng-tracker inference-batch-times-seqlen-threshold= max-tokens-to-oom=
        output-bert-embeddings bert-embedder-type= use-legacy-static-engine inference-max-requests=
        inference-max-seq-length= inference-dynamic-batching
        inference-dynamic-batching-buffer-size-gb= inference-dynamic-batching-paused-buffer-size-gb=
        inference-dynamic-batching-mamba-memory-ratio= inference-dynamic-batching-block-size=
        inference-dynamic-batching-max-requests= inference-dynamic-batching-max-tokens=
        inference-dynamic-batching-num-cuda-graphs=
        inference-dynamic-batching-track-paused-request-events
        inference-dynamic-batching-track-generated-token-events decode-only-cuda-graphs
        inference-cuda-graph-all-prefills inference-cuda-graph-max-tokens=
        inference-dynamic-batching-unified-memory-level= enable-chunked-prefill
        num-speculative-tokens=
        inference-dynamic-batching-prefix-caching/no-inference-dynamic-batching-prefix-caching
        inference-dynamic-batching-prefix-caching-eviction-policy=
        inference-dynamic-batching-prefix-caching-coordinator-policy=
        inference-dynamic-batching-prefix-caching-routing-alpha=
        inference-dynamic-batching-prefix-caching-mamba-gb=
        inference-dynamic-batching-cuda-graph-mixed-prefill-count=
        inference-dynamic-batching-cuda-graph-sizing-distribution=
        inference-dynamic-batching-sampling-backend= use-same-sampling-seed-across-dp-ranks
        inference-dynamic-batching-async-sched-mode= inference-dynamic-batching-logprobs-mode=
        inference-logging-step-interval=
        inference-text-gen-server-logging/no-inference-text-gen-server-logging
        inference-wandb-logging/no-inference-wandb-logging inference-coordinator-port=
        inference-use-synchronous-zmq-collectives/no-inference-use-synchronous-zmq-collectives
        inference-disable-ep-consensus/no-inference-disable-ep-consensus inference-shards=
        """,
    ),
    (
        "this diagnostic of Megatron was not checked here",
        """
        config-logger-dir= check-weight-hash-across-dp-replicas-interval= gpu-sniff-test-interval=
        train-sync-interval= dump-param-to-param-group-map= flight-recorder-dump-path=
        flight-recorder-trace-buffer-size=
        no-flight-recorder-dump-on-timeout/disable-flight-recorder-dump-on-timeout
        flight-recorder-include-stack-trace
        no-flight-recorder-include-only-active/disable-flight-recorder-include-only-active
        no-flight-recorder-extra-dump-on-exec/disable-flight-recorder-extra-dump-on-exec
        tensorboard-queue-size= log-memory-to-tensorboard log-memory-interval=
        log-device-memory-used log-max-attention-logit no-barrier-with-level-1-timing logging-level=
        log-energy log-straggler straggler-ctrlr-port= straggler-minmax-count=
        disable-straggler-on-startup run-workload-inspector-server
        """,
    ),
    (
        "the visible context would no longer be the effective context",
        """
        window-size= window-attn-skip-freq=
        """,
    ),
    (
        "--optimizer is adam",
        """
        muon-momentum= muon-no-split-qkv muon-nesterov muon-scale-mode= muon-fp32-matmul-prec=
        muon-coefficient-type= muon-num-ns-steps= muon-tp-mode= muon-extra-scale-factor=
        muon-scalar-optimizer= lion-beta1= lion-beta2=
        """,
    ),
    (
        "of Megatron's profilers only PyTorch's is supported (--profile --use-pytorch-profiler)",
        """
        pytorch-profiler-collect-chakra record-memory-history memory-snapshot-path= record-shapes
        nvtx-ranges
        """,
    ),
    (
        "Megatron 0.19 does not read it any more",
        """
        rampup-batch-size=3
        """,
    ),
    (
        "choose --exit-signal-handler",
        """
        exit-signal-handler-for-dataloader exit-signal-handler-for-training
        """,
    ),
    (
        "Megatron has given it up",
        """
        batch-size= checkpoint-activations warmup= model-parallel-size=
        """,
    ),
    (
        "a step that is not finite is never taken: choose --on-nonfinite skip",
        """
        no-check-for-nan-in-loss-and-grad
        """,
    ),
    (
        "choose --spike-deviations",
        """
        check-for-large-grads
        """,
    ),
    (
        "it belongs to Megatron's reruns, which are off",
        """
        result-rejected-tracker-filename= error-injection-rate= error-injection-type=
        """,
    ),
    (
        "order and epochs belong to the pack",
        """
        dataloader-type= phase-transition-iterations=
        """,
    ),
    (
        "it belongs to reinforcement learning",
        """
        perform-rl-step rl-prompts-per-eval= grpo-prompts-per-step= grpo-group-size=
        rl-generation-lag= rl-submission-granularity= rl-consumption-granularity= grpo-iterations=
        grpo-clamp-eps-lower= grpo-clamp-eps-upper= grpo-kl-beta= grpo-entropy-term-weight=
        grpo-filter-groups-with-same-reward langrl-env-config= rl-default-temperature=
        rl-default-top-p= rl-default-top-k= rl-offload-optimizer-during-inference
        rl-kv-cache-management-mode= rl-persist-cuda-graphs/no-rl-persist-cuda-graphs
        rl-partial-rollouts/no-rl-partial-rollouts
        rl-inference-logprobs-is-correction/no-rl-inference-logprobs-is-correction
        rl-importance-sampling-truncation-coef= rl-use-sequence-packing/no-rl-use-sequence-packing
        rl-sequence-packing-max-sequences-per-bin= rl-sequence-packing-algo=
        rl-training-cuda-graphs/no-rl-training-cuda-graphs rl-inference-tensor-model-parallel-size=
        rl-inference-pipeline-model-parallel-size= rl-inference-expert-model-parallel-size=
        rl-inference-expert-tensor-model-parallel-size= rl-inference-model-unified-memory-level=
        rl-offload-inference-model-weights-when-idle/no-rl-offload-inference-model-weights-when-idle
        refit-method= rl-verify-model-weights-swap/no-rl-verify-model-weights-swap
        rl-skip-bos-token/no-rl-skip-bos-token rl-profile rl-profile-dir= rl-inference-parsers=*
        """,
    ),
    (
        "it writes files that no manifest lists",
        """
        save-params-interval= save-activations-interval= save-wgrads-interval= save-dgrads-interval=
        """,
    ),
    (
        "choose --keep-last",
        """
        save-retain-interval=
        """,
    ),
    (
        "checkpoints are torch_dist folders with integrity.json",
        """
        load-main-params-from-ckpt ckpt-format= auto-detect-ckpt-format ckpt-convert-format=
        ckpt-convert-save= ckpt-convert-update-legacy-dist-opt-format dist-ckpt-save-pre-mcore-014
        replication replication-jump= replication-factor=
        no-stream-ckpt-dequant/disable-stream-ckpt-dequant override-ckpt-iteration=
        """,
    ),
    (
        "such checkpoints would be loaded without being verified",
        """
        non-persistent-save-interval= non-persistent-ckpt-type= non-persistent-global-ckpt-dir=
        non-persistent-local-ckpt-dir= non-persistent-local-ckpt-algo=
        """,
    ),
    (
        "give flags: a checkpoint could switch on what is not supported here",
        """
        use-checkpoint-args use-mp-args-from-checkpoint-args
        no-use-tokenizer-model-from-checkpoint-args/disable-use-tokenizer-model-from-checkpoint-args
        """,
    ),
    (
        "not checked with verified checkpoints",
        """
        async-ckpt-cpu-priority= async-ckpt-io-priority= async-ckpt-use-cpu-shm
        ckpt-fully-parallel-load-exchange-algo= ckpt-fully-parallel-save-process-group=
        ckpt-fully-parallel-load-process-group= ckpt-assume-constant-structure
        no-ckpt-load-validate-sharding-integrity/disable-ckpt-load-validate-sharding-integrity
        dist-ckpt-workers=
        """,
    ),
    (
        "Megatron 0.19.2 writes damaged optimizer states with it",
        """
        dist-ckpt-optim-fully-reshardable distrib-optim-fully-reshardable-mem-efficient
        """,
    ),
    (
        "this way of communicating was not checked for equal losses",
        """
        no-align-grad-reduce/disable-align-grad-reduce lazy-mpu-init nccl-communicator-config-path=
        use-tp-pp-dp-mapping disable-gloo-process-groups use-sharp sharp-enabled-group=
        high-priority-stream-groups=+ distributed-timeout-seconds-after-init=
        ddp-pad-buckets-for-high-nccl-busbw ddp-reduce-scatter-with-fp32-accumulation
        ddp-param-name-patterns-for-fp32-local-accumulation=+ ddp-average-in-collective
        overlap-param-gather-with-optimizer-step no-align-param-gather
        no-use-layer-wise-param-layout use-nccl-ub disable-symmetric-registration
        no-gradient-reduce-div-fusion num-distributed-optimizer-instances=
        """,
    ),
    (
        "torchrun and --rank-timeout-seconds watch the ranks",
        """
        local-rank= adlr-autoresume adlr-autoresume-interval= inprocess-restart
        inprocess-max-iterations= inprocess-monitor-thread-interval=
        inprocess-monitor-process-interval= inprocess-progress-watchdog-interval=
        inprocess-heartbeat-interval= inprocess-soft-timeout= inprocess-hard-timeout=
        inprocess-heartbeat-timeout= inprocess-barrier-timeout= inprocess-completion-timeout=
        inprocess-last-call-wait= inprocess-termination-grace-time= inprocess-granularity=
        inprocess-active-world-size= inprocess-empty-cuda-cache enable-ft-package calc-ft-timeouts
        ft-num-warmup-iters=
        """,
    ),
    (
        "the ranks would not talk to each other",
        """
        fake-process-group
        """,
    ),
    (
        "evaluations use the batch of training",
        """
        eval-global-batch-size= eval-micro-batch-size=
        """,
    ),
    (
        "nothing would be trained",
        """
        skip-train test-mode
        """,
    ),
    (
        "choose --eval-iters",
        """
        full-validation
        """,
    ),
    (
        "a pack has one validation split",
        """
        multiple-validation-sets validation-set-names=+
        """,
    ),
    (
        "the data come from --pack",
        """
        data-path=* train-data-path=* valid-data-path=* test-data-path=* data-args-path=
        per-split-data-args-path= per-dataset-sequences-path= mock-data fim-data fim-rate=
        fim-spm-rate= fim-split-sample= fim-fragment-rate= fim-no-prefix= fim-prefix-token=
        fim-middle-token= fim-suffix-token= fim-pad-token= fim-eod-token= sft
        sft-tokenizer-prompt-format=
        """,
    ),
    (
        "rows have the length of the pack",
        """
        encoder-seq-length= decoder-seq-length=
        """,
    ),
    (
        "it belongs to another kind of dataset",
        """
        sample-rate= mask-prob= short-seq-prob= object-storage-cache-path=
        allow-ambiguous-pad-tokens
        """,
    ),
    (
        "boundaries come from the pack, not from scanning for EOD",
        """
        reset-position-ids reset-attention-mask
        """,
    ),
    (
        "choose --mask-cross-document-targets when packing",
        """
        eod-mask-loss
        """,
    ),
    (
        "the rows of the embedding are --vocab-size, nothing is added",
        """
        padded-vocab-size= no-pad-vocab-size/disable-pad-vocab-size vocab-extra-ids=
        """,
    ),
    (
        "nothing of a tokenizer or checkpoint is executed",
        """
        trust-remote-code
        """,
    ),
    (
        "it belongs to retrieval models",
        """
        ict-head-size= biencoder-projection-dim= biencoder-shared-query-context-model ict-load=
        bert-load= titles-data-path= query-in-block-prob= use-one-sent-docs evidence-data-path=
        retriever-report-topk-accuracies=+ retriever-score-scaling block-data-path= embedding-path=
        indexer-batch-size= indexer-log-interval=
        """,
    ),
    (
        "it belongs to vision models",
        """
        num-classes= img-h= img-w= num-channels= patch-dim= classes-fraction=
        data-per-class-fraction= no-data-sharding head-lr-mult= vision-pretraining
        vision-pretraining-type= vision-backbone-type= swin-backbone-type= mask-type= mask-factor=
        iter-per-epoch= dino-local-img-size= dino-local-crops-number= dino-head-hidden-size=
        dino-bottleneck-size= dino-freeze-last-layer= dino-norm-last-layer dino-warmup-teacher-temp=
        dino-teacher-temp= dino-warmup-teacher-temp-epochs=
        """,
    ),
    (
        "it belongs to distillation",
        """
        logits-save-top-k= logits-save-top-p= logits-save-top-p-min-k= logits-save-dir=
        logits-save-dtype= logits-load-dir= logits-load-decode-threads= logits-load-prefetch-factor=
        logits-load-msc-prefetch-depth= logits-load-kd-loss-alpha= logits-load-ignore-errors
        """,
    ),
    (
        "give flags: the file would replace what the pack decides",
        """
        yaml-cfg=
        """,
    ),
    (
        "it is for states of Adam in fewer bits, which round differently, and the recipes fit without: "
        "share the states among ranks (--use-distributed-optimizer)",
        """
        use-precision-aware-optimizer main-grads-dtype= main-params-dtype= exp-avg-dtype=
        exp-avg-sq-dtype=
        """,
    ),
    (
        "nothing would ask for a rerun: --on-nonfinite reports NaN and Inf",
        """
        rerun-mode=
        """,
    ),
    (
        "the check belongs to the stock loss function",
        """
        check-for-spiky-loss
        """,
    ),
    (
        "storage is read as files",
        """
        enable-msc
        """,
    ),
    (
        "faults are not injected into a real run",
        """
        fault-injector-ranks= fault-injector-num-ranks= fault-injector-fault-types=
        fault-injector-fault-probabilities= fault-injector-fault-delay=
        fault-injector-delay-start-iteration= fault-injector-mtti-seconds=
        fault-injector-offset-seconds= fault-injector-seed=
        """,
    ),
    (
        "the layers are counted by --num-layers",
        """
        encoder-num-layers= decoder-num-layers=
        """,
    ),
    (
        "the attention of packed rows has no dropout: --attention-dropout 0",
        """
        attention-dropout=
        """,
    ),
    (
        "the norms of all supported models are RMSNorm: --normalization RMSNorm",
        """
        normalization=
        """,
    ),
)
"""Reason and flags; `HARMLESS` has values of theirs that ask for nothing."""

HARMLESS: Mapping[str, tuple[str, ...]] = {
    "--cp-comm-type": ("p2p",),
    "--dataloader-type": ("single",),
    "--rerun-mode": ("disabled",),
    "--ckpt-format": ("torch_dist",),
    "--attention-dropout": ("0", "0.0"),
    "--normalization": ("RMSNorm",),
    "--softmax-type": ("vanilla",),
    "--cuda-graph-impl": ("none",),
    "--rope-type": ("rope",),
    "--expert-model-parallel-size": ("1",),
    "--num-distributed-optimizer-instances": ("1",),
    "--tensor-parallel-num-weight-shards": ("1",),
}
"""Values of unsupported flags that ask for what happens anyway."""

CHOICES: Mapping[str, str] = {
    "--attention-backend": "the others do not keep documents apart in packed rows",
    "--position-embedding-type": (
        "the positions of packed rows begin again with every document; for YaRN give --change-rope-yarn"
    ),
    "--transformer-impl": "layers for inference cannot be trained",
    "--optimizer": "the states of no other were saved and loaded here",
    "--recompute-modules": (
        "Transformer Engine's layers have their norms inside the matrix products, and without it Megatron "
        "0.19.2 fails on layernorm; the others belong to other models"
    ),
    "--fp8-recipe": (
        "delayed scaling keeps its scales in checkpoints as a pickle, which Transformer Engine 2.20 "
        "refuses to load; blockwise could not be rehearsed, its kernels ask the driver of a real card; "
        "mxfp8 needs a B200"
    ),
}
"""Reason why a supported flag has fewer choices than in Megatron."""


@dataclass(frozen=True, kw_only=True)
class MegatronFlag:
    """One flag of Megatron's parser."""

    spellings: tuple[str, ...]
    """Spellings with dashes; the first is the name."""
    values: str
    """Kind of its values, as in the table; a "switch" has none."""
    kind: Kind
    """Class of the flag."""
    why: str
    """The test that shows its effect, or the reason."""

    @property
    def name(self) -> str:
        """The first spelling."""
        return self.spellings[0]

    @property
    def nargs(self) -> str | int | None:
        """Return argparse's nargs: 0 for a switch, None for one value."""
        if self.values == "switch":
            return 0
        if self.values.endswith("3"):
            return 3
        return self.values[-1] if self.values.endswith(("+", "*")) else None

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are supported, empty where any of its kind is."""
        return tuple(self.values.rstrip("+|").split("|")) if "|" in self.values else ()


@functools.cache
def megatron_flags_by_spelling() -> dict[str, MegatronFlag]:
    """Return every spelling of every flag in the table, with its flag.

    Raises:
        AssertionError: a flag stands there twice.
    """
    found: dict[str, MegatronFlag] = {}
    tables: tuple[tuple[Kind, tuple[tuple[str, str], ...]], ...] = (
        ("supported", SUPPORTED),
        ("inert", INERT),
        ("refused", REFUSED),
    )
    for kind, groups in tables:
        for why, words in groups:
            for word in words.split():
                names, equals, values = word.partition("=")
                spellings = tuple(f"--{name}" for name in names.split("/"))
                flag = MegatronFlag(
                    spellings=spellings, values=values if equals else "switch", kind=kind, why=why
                )
                for spelling in spellings:
                    assert spelling not in found, f"{spelling} stands twice in the table of flags"
                    found[spelling] = flag
    return found


class GivenFlags:
    """Megatron's flags on a command line, by the first spelling of each.

    Args:
        values: the words of each flag; of one that is given twice those of the last time.
    """

    def __init__(self, values: Mapping[str, tuple[str, ...]]) -> None:
        self.values = dict(values)

    def __contains__(self, flag: str) -> bool:
        return flag in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def word(self, flag: str) -> str | None:
        """Return the value of a flag with one value, or None if it is not given."""
        words = self.values.get(flag)
        return words[0] if words else None

    def number(self, flag: str, default: float) -> float:
        """Return the value as a number, or `default` if the flag is not given."""
        word = self.word(flag)
        return default if word is None else float(word)

    def whole(self, flag: str, default: int) -> int:
        """Return the value as a whole number, or `default` if the flag is not given."""
        word = self.word(flag)
        return default if word is None else int(word)

    def text(self, flag: str) -> str:
        """Return the flag as it is given, for messages."""
        return " ".join((flag, *map(_short, self.values[flag])))


def read_flags(argv: Sequence[str], *, ours: Sequence[str] = ()) -> GivenFlags:
    """Read Megatron's flags as its own parser would, without importing it.

    Args:
        argv: the command line without our own options.
        ours: our own options, to guess what an unknown flag should have been.

    Raises:
        ValueError: a flag that neither of us knows, one without its value, or with one of another kind.
    """
    known = megatron_flags_by_spelling()
    namespace, unknown = _parser().parse_known_args(list(argv))
    if unknown:
        strange = [word for word in unknown if word.startswith("-")] or unknown
        near = difflib.get_close_matches(strange[0].partition("=")[0], [*known, *ours], n=2, cutoff=0.75)
        guess = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(
            f"unrecognized arguments: {_short(' '.join(unknown))}{guess}: --help shows our options, "
            "--megatron-help Megatron's"
        )
    values = {name: _words(given) for name, given in vars(namespace).items()}
    for name, words in values.items():
        _check_values(known[name], words)
    return GivenFlags(values)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="megatron_exact.training.pretrain",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in dict.fromkeys(megatron_flags_by_spelling().values()):
        options: dict[str, Any] = {"dest": flag.name}
        if flag.nargs == 0:
            parser.add_argument(*flag.spellings, action="store_const", const=(), **options)
        else:
            parser.add_argument(*flag.spellings, nargs=flag.nargs, **options)
    return parser


def _words(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _short(word: str) -> str:
    return word if len(word) <= 60 else f"{word[:40]}... ({len(word)} characters)"


def _whole(word: str) -> int:
    """Return the word as a whole number below 10^12, -1 for any other word."""
    return int(word) if re.fullmatch(r"\+?[0-9]{1,12}", word) else -1


def _check_values(flag: MegatronFlag, words: Sequence[str]) -> None:
    """Raise for values of another kind; those of unsupported and inert flags are ignored."""
    checked = VALUE_KINDS.get(flag.values.rstrip("+"))
    if flag.kind != "supported" or not words:
        return
    strange = [word for word in words if flag.choices and word not in flag.choices]
    if strange:
        why = f": {CHOICES[flag.name]}" if flag.name in CHOICES else ""
        raise ValueError(
            f"{flag.name} {_short(strange[0])} is not supported{why}; choose "
            f"{' or '.join(filter(None, (', '.join(flag.choices[:-1]), flag.choices[-1])))}"
        )
    if checked is None:
        return
    expected, is_good = checked
    for word in words:
        if not is_good(word):
            raise ValueError(f"{flag.name} {_short(word)} is not {expected}: choose another value")


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


VALUE_KINDS: Mapping[str, tuple[str, Callable[[str], bool]]] = {
    "count": ("a whole number of 1 or more", lambda word: _whole(word) >= 1),
    "int": ("a whole number of 0 or more", lambda word: _whole(word) >= 0),
    "number": ("a finite number of 0 or more", lambda word: 0 <= _number(word) < math.inf),
    "share": ("a number from 0 to 1", lambda word: 0 <= _number(word) <= 1),
}
"""Kind of value in the table: its words in a message, and whether a word is one."""


def refuse_flags(given: GivenFlags) -> None:
    """Raise for flags of the class `refused`.

    Raises:
        ValueError: every such flag, its value and the reason.
    """
    known = megatron_flags_by_spelling()
    found = [
        f"{given.text(name)} is not supported: {known[name].why}"
        for name, words in given.values.items()
        if known[name].kind == "refused" and not (name in HARMLESS and set(words) <= {*HARMLESS[name]})
    ]
    if found:
        raise ValueError("; ".join(found))


Condition = tuple[str, Callable[[GivenFlags], bool]]
"""What a flag needs to have an effect: in words, and as a test of all flags of a job."""


def _is_adam(job: GivenFlags) -> bool:
    return job.word("--optimizer") in (None, "adam")


def _is_on_gpu(job: GivenFlags) -> bool:
    return job.word("--distributed-backend") != "gloo"


def _is_decaying(job: GivenFlags) -> bool:
    return job.word("--lr-decay-style") != "constant"


def _warms_up(job: GivenFlags) -> bool:
    return any(job.number(f"--lr-warmup-{unit}", 0) > 0 for unit in ("iters", "samples", "fraction"))


def _is_recomputing(kind: str) -> Callable[[GivenFlags], bool]:
    def asks(job: GivenFlags) -> bool:
        given = job.word("--recompute-granularity")
        return given == kind or (kind == "selective" and "--recompute-activations" in job)

    return asks


def _is_interleaved(job: GivenFlags) -> bool:
    flags = ("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank")
    return any(flag in job for flag in (*flags, "--pipeline-model-parallel-layout"))


def has_rope(job: GivenFlags) -> bool:
    """Return whether queries and keys are rotated."""
    return "--use-rotary-position-embeddings" in job or job.word("--position-embedding-type") == "rope"


def _given(*flags: str) -> Condition:
    return " or ".join(flags), lambda job: any(flag in job for flag in flags)


CONDITIONS: tuple[tuple[Condition, str], ...] = (
    (("--optimizer adam", _is_adam), "adam-beta1 adam-beta2 adam-eps"),
    (("--optimizer sgd", lambda job: not _is_adam(job)), "sgd-momentum"),
    (_given("--fp16"), "initial-loss-scale min-loss-scale loss-scale-window hysteresis"),
    (_given("--fp16"), "accumulate-allreduce-grads-in-fp32"),
    (_given("--fp16", "--bf16"), "loss-scale"),
    (_given("--bf16"), "grad-reduce-in-bf16"),
    (_given("--fp8-format"), "fp8-recipe"),
    (("a --lr-decay-style that falls", _is_decaying), "min-lr decoupled-min-lr"),
    (
        (
            "a --lr-decay-style that falls, or --lr-warmup-fraction",
            lambda job: _is_decaying(job) or "--lr-warmup-fraction" in job,
        ),
        "lr-decay-iters lr-decay-samples",
    ),
    (
        ("--lr-decay-style WSD", lambda job: job.word("--lr-decay-style") == "WSD"),
        "lr-wsd-decay-style lr-wsd-decay-iters lr-wsd-decay-samples",
    ),
    (("a warm-up", _warms_up), "lr-warmup-init"),
    (_given("--decoupled-lr"), "decoupled-min-lr"),
    (_given("--use-rope-scaling"), "rope-scaling-factor"),
    (
        ("--position-embedding-type rope", has_rope),
        "rotary-base rotary-percent no-rope-freq use-rope-scaling rope-scaling-factor",
    ),
    (("--recompute-granularity full", _is_recomputing("full")), "recompute-method recompute-num-layers"),
    (("--recompute-granularity selective", _is_recomputing("selective")), "recompute-modules"),
    (
        ("--eval-iters above 0", lambda job: job.whole("--eval-iters", 100) > 0),
        "eval-interval start-eval-at-iter log-validation-ppl-to-tensorboard",
    ),
    (_given("--save"), "save-interval no-save-optim no-save-rng async-save no-ckpt-fully-parallel-save"),
    (
        _given("--load", "--pretrained-checkpoint"),
        "ckpt-step finetune no-load-optim no-load-rng ckpt-fully-parallel-load",
    ),
    (
        _given("--load"),
        "override-opt_param-scheduler use-checkpoint-opt_param-scheduler",
    ),
    (_given("--manual-gc"), "manual-gc-interval no-manual-gc-eval"),
    (_given("--exit-signal-handler"), "exit-signal"),
    (
        _given("--tensorboard-dir"),  # by default inside the folder of the records
        "tensorboard-log-interval log-timers-to-tensorboard no-log-loss-scale-to-tensorboard "
        "log-validation-ppl-to-tensorboard log-world-size-to-tensorboard",
    ),
    (
        ("--timing-log-level 1 or 2", lambda job: job.word("--timing-log-level") in ("1", "2")),
        "timing-log-option",
    ),
    (_given("--wandb-project"), "wandb-exp-name wandb-save-dir wandb-entity"),
    (_given("--save"), "log-progress"),
    (
        _given("--profile"),
        "use-pytorch-profiler profile-step-start profile-step-end profile-ranks "
        "pytorch-profiler-collect-shapes pytorch-profiler-collect-callstack",
    ),
    (
        (
            "--tensor-model-parallel-size above 1",
            lambda job: job.whole("--tensor-model-parallel-size", 1) > 1,
        ),
        "sequence-parallel",
    ),
    (
        ("an interleaved pipeline", _is_interleaved),
        "microbatch-group-size-per-virtual-pipeline-stage no-overlap-p2p-communication",
    ),
    (_given("--overlap-grad-reduce"), "ddp-bucket-size ddp-num-buckets"),
    (
        ("Transformer Engine", lambda job: job.word("--transformer-impl") != "local"),
        "attention-backend",
    ),
    (
        ("a GPU", _is_on_gpu),
        "no-gradient-accumulation-fusion no-bias-dropout-fusion empty-unused-memory-level "
        "use-cpu-initialization",
    ),
)
"""Supported flags that do nothing unless something else is given, too."""


def flags_without_effect(user: GivenFlags, job: GivenFlags) -> list[str]:
    """Return the user's flags that change nothing, each with the reason.

    Args:
        user: what stands on the command line, without a recipe's flags.
        job: the whole Megatron command line.
    """
    known = megatron_flags_by_spelling()
    found = {name: known[name].why for name in user if known[name].kind == "inert"}
    for (words, holds), flags in CONDITIONS:
        for word in flags.split():
            name = f"--{word}"
            if name in user and name not in found and not holds(job):
                found[name] = f"needs {words}"
    return [f"{user.text(name)} ({why})" for name, why in found.items()]
