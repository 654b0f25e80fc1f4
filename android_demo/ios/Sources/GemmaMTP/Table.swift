// NOT COMPILED by this project: only its syntax was checked. It follows runtime_ref/tables.py.
import Foundation

/// An embedding table whose rows are read where they lie in a mapped file and widened to float32.
public final class Table {
    public let columns: Int

    private let facts: TableFacts
    private let file: String
    private let data: Data
    private let scales: Data?

    /// Bits of a number, by encoding; from the unsigned ones, half of their range is subtracted.
    private static let bits = ["float32": 32, "int8": 8, "uint8": 8, "uint4": 4, "uint3": 3, "uint2": 2]
    private static let scaleBytes = ["float32": 4, "float16": 2, "bfloat16": 2]

    /// Throws `InputError` if the manifest describes something that its files are too short for.
    public init(bundle: URL, facts: TableFacts) throws {
        self.facts = facts
        columns = facts.columns
        file = bundle.appendingPathComponent(facts.data.file).path
        data = try Data(contentsOf: bundle.appendingPathComponent(facts.data.file), options: .alwaysMapped)
        scales = try facts.scales.map {
            try Data(contentsOf: bundle.appendingPathComponent($0.file), options: .alwaysMapped)
        }
        let groups = (facts.columns + facts.groupSize - 1) / facts.groupSize
        guard let bits = Table.bits[facts.encoding], facts.rowBytes * 8 >= facts.columns * bits,
              facts.data.offset + facts.rows * facts.rowBytes <= data.count
        else {
            throw InputError("\(file): too short for the table that the manifest describes; export the bundle again")
        }
        guard facts.encoding != "float32" else { return }
        guard let place = facts.scales, let bytes = Table.scaleBytes[place.dtype ?? ""],
              place.offset + facts.rows * groups * bytes <= scales?.count ?? 0
        else {
            throw InputError("\(file): the table's scales are missing or too short; export the bundle again")
        }
    }

    /// Rows `[T, columns]` of the ids, end to end; throws `InputError` for an id beyond the table.
    public func rows(_ ids: [Int]) throws -> [Float] {
        var found: [Float] = []
        found.reserveCapacity(ids.count * columns)
        for id in ids {
            guard id >= 0, id < facts.rows else {
                throw InputError("\(file): has \(facts.rows) rows, token \(id) was chosen; export it again")
            }
            appendRow(id, to: &found)
        }
        return found
    }

    private func appendRow(_ id: Int, to found: inout [Float]) {
        let groups = (columns + facts.groupSize - 1) / facts.groupSize
        data.withUnsafeBytes { bytes in
            let row = UnsafeRawBufferPointer(rebasing: bytes[(facts.data.offset + id * facts.rowBytes)...])
            if facts.encoding == "float32" {
                for i in 0..<columns {
                    found.append(Float(bitPattern: row.loadUnaligned(fromByteOffset: 4 * i, as: UInt32.self)))
                }
                return
            }
            let bits = Table.bits[facts.encoding]!
            for i in 0..<columns {
                found.append(number(row, i, bits) * scale(id * groups + i / facts.groupSize))
            }
        }
    }

    /// Number `i` of a row, without its scale: bits `i * bits` and on of the little-endian stream.
    private func number(_ row: UnsafeRawBufferPointer, _ i: Int, _ bits: Int) -> Float {
        if facts.encoding == "int8" {
            return Float(Int8(bitPattern: row[i]))
        }
        let first = i * bits
        var value = Int(row[first / 8]) >> (first % 8)
        if first % 8 + bits > 8 {
            value |= Int(row[first / 8 + 1]) << (8 - first % 8)
        }
        return Float((value & ((1 << bits) - 1)) - (1 << (bits - 1)))
    }

    private func scale(_ i: Int) -> Float {
        guard let scales, let place = facts.scales else { return 1 }
        return scales.withUnsafeBytes { bytes in
            switch place.dtype {
            case "float16":
                return widened(bytes.loadUnaligned(fromByteOffset: place.offset + 2 * i, as: UInt16.self))
            case "bfloat16":
                let half = bytes.loadUnaligned(fromByteOffset: place.offset + 2 * i, as: UInt16.self)
                return Float(bitPattern: UInt32(half) << 16)
            default:
                return Float(bitPattern: bytes.loadUnaligned(fromByteOffset: place.offset + 4 * i, as: UInt32.self))
            }
        }
    }
}

/// A float16; Swift's own type for it is missing on Intel Macs.
func widened(_ half: UInt16) -> Float {
    let exponent = Int(half >> 10 & 31), fraction = Float(half & 1023)
    let size: Float
    switch exponent {
    case 0: size = fraction * Float(sign: .plus, exponent: -24, significand: 1)
    case 31: size = fraction == 0 ? .infinity : .nan
    default: size = (1024 + fraction) * Float(sign: .plus, exponent: exponent - 25, significand: 1)
    }
    return half >> 15 == 0 ? size : -size
}
