// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/decoder.py, with fixed K.
import Foundation

/// How one text is generated.
public struct Options {
    /// The largest number of tokens to generate, at least 1.
    public var maxNewTokens = 128
    /// K of every round; 0 is plain decoding, nil the bundle's default.
    public var numDraftTokens: Int?
    /// How tokens are chosen; nil as the checkpoint recommends.
    public var sampling: Sampling?

    public init(maxNewTokens: Int = 128, numDraftTokens: Int? = nil, sampling: Sampling? = nil) {
        (self.maxNewTokens, self.numDraftTokens, self.sampling) = (maxNewTokens, numDraftTokens, sampling)
    }
}

/// Counts of one generation. Drafts after an end token or past the budget count as drafted, not as accepted.
public struct Stats {
    public var rounds = 0
    public var drafted = 0
    public var accepted = 0
    /// `eos`, `length`, `max_seq_len` or `cancelled`.
    public var finishReason = ""

    /// Accepted drafts / proposed drafts; nil if nothing was drafted.
    public var acceptanceRate: Double? {
        drafted > 0 ? Double(accepted) / Double(drafted) : nil
    }
}

/// The decoding loop: prefill, then rounds. It takes and returns token ids; the app converts text, for example with
/// swift-transformers, which reads the bundle's tokenizer.json. Call it from one thread at a time, not the main one.
public final class Decoder {
    public let engine: GraphEngine

    /// - Parameter digest: hexadecimal sha256 of the manifest, as `export` printed it; nil for any bundle.
    public init(bundle: URL, digest: String? = nil) throws {
        engine = try GraphEngine(bundle: bundle, digest: digest)
    }

    /// Calls `onToken` with each new token id, until it returns false, the text ends, or the budget or context is used up.
    ///
    /// Speculative and plain decoding give the same tokens.
    ///
    /// - Parameters:
    ///   - prompt: token ids, the first of them the bundle's `tokens.bos`.
    ///   - options: budget, drafting and sampling.
    ///   - onToken: returns false to cancel.
    /// - Throws: `InputError` for a prompt that cannot be run, or an option that is out of its range.
    public func generate(prompt: [Int], options: Options, onToken: (Int) -> Bool) throws -> Stats {
        let manifest = engine.manifest
        let numDraftTokens = options.numDraftTokens ?? manifest.numDraftTokens.default
        try check(prompt, options, numDraftTokens)
        let sampling = try options.sampling ?? defaultSampling()
        let room = manifest.maxSeqLen - prompt.count
        let outOfBudget = options.maxNewTokens <= room ? "length" : "max_seq_len"
        var (stats, left) = (Stats(), min(options.maxNewTokens, room))
        var done = try engine.prefill(prompt, sampling: sampling)
        var prefilled = true
        while true {
            let end = done.tokens.firstIndex { manifest.tokens.eos.contains($0) }
            if let end {
                // Tokens after an end token are dropped, even if they were accepted.
                done.tokens = Array(done.tokens[...end])
                done.accepted = min(done.accepted, done.tokens.count)
            }
            left -= done.tokens.count
            if !prefilled {
                stats.rounds += 1
                stats.drafted += done.drafted
                stats.accepted += done.accepted
            }
            let isRound = !prefilled
            prefilled = false
            if end != nil || left == 0 {
                stats.finishReason = end != nil ? "eos" : outOfBudget
            }
            for (i, token) in done.tokens.enumerated() where !onToken(token) {
                // Only tokens that were given out count; a text that just ended was not cancelled.
                if isRound { stats.accepted -= done.accepted - min(done.accepted, i + 1) }
                if i + 1 < done.tokens.count || stats.finishReason.isEmpty { stats.finishReason = "cancelled" }
                return stats
            }
            if !stats.finishReason.isEmpty {
                return stats
            }
            let last = done.tokens[done.tokens.count - 1]
            // The bonus token takes one token of the budget as well.
            let drafts = try engine.draft(last: last, numDraftTokens: min(numDraftTokens, left - 1))
            done = try engine.verify(last: last, drafts: drafts, sampling: sampling)
        }
    }

    /// The checkpoint's recommendation; greedy for a bundle without one.
    private func defaultSampling() throws -> Sampling {
        guard let entry = engine.manifest.sampling else { return try Sampling() }
        return try Sampling(temperature: entry.temperature, topP: entry.topP, topK: entry.topK)
    }

    private func check(_ prompt: [Int], _ options: Options, _ drafts: Int) throws {
        let manifest = engine.manifest
        guard !prompt.isEmpty else {
            throw InputError("the prompt is empty: expected at least one token")
        }
        guard prompt.count < manifest.maxSeqLen else {
            throw InputError(
                "the prompt has \(prompt.count) tokens, the bundle's context has \(manifest.maxSeqLen) for prompt and "
                    + "answer together; shorten it, or export with a larger --max-seq-len"
            )
        }
        if let token = prompt.first(where: { !(0..<manifest.target.vocabSize).contains($0) }) {
            throw InputError("the prompt has token id \(token), expected 0 to \(manifest.target.vocabSize - 1)")
        }
        guard (0...manifest.numDraftTokens.max).contains(drafts) else {
            let maxDrafts = manifest.numDraftTokens.max
            throw InputError(
                "\(drafts) draft tokens a round were asked for, the bundle was exported for up to \(maxDrafts)"
            )
        }
        guard options.maxNewTokens >= 1 else {
            throw InputError("\(options.maxNewTokens) new tokens were asked for, expected at least 1")
        }
    }
}
