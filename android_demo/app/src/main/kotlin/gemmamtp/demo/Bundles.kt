package gemmamtp.demo

import gemmamtp.core.InputError
import gemmamtp.core.MANIFEST
import gemmamtp.core.Progress
import gemmamtp.core.firstChangedFile
import gemmamtp.core.readManifest
import java.io.Closeable
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.InputStream

/** A bundle that can be opened: its directory. */
data class BundleFolder(val dir: File) {
    val name: String get() = dir.name
}

/** A file of a source; [size] is in bytes, 0 if it is not known. */
class SourceFile(val name: String, val size: Long, val open: () -> InputStream)

/** A place that a bundle can be copied from. A bundle is mapped into memory, so it must be files on disk. */
interface BundleSource : Closeable {
    val name: String

    /** Its files, without those in subfolders; throws IOException. */
    fun files(): List<SourceFile>
}

/** Prefix of the name of a bundle while another replaces it. */
private const val OLD_PREFIX = ".old-"

/**
 * The bundles of this device.
 *
 * @param installed the folder of the app's own copies.
 * @param pushed folders outside of the app that have bundles in them, or are bundles.
 * @param devices see [BundleOpener]: what is checked here is not read again when it is opened.
 */
class Bundles(private val installed: File, private val pushed: List<File>, private val devices: File) {
    init {
        clean()
    }

    /** All bundles, by name; folders that cannot be read have none. */
    fun list(): List<BundleFolder> {
        val others = pushed.flatMap { folder -> listOf(folder) + folder.listFiles().orEmpty().sorted() }
        return (installed.listFiles().orEmpty().sorted() + others)
            .filter { !it.name.startsWith(".") && File(it, MANIFEST).isFile }.map(::BundleFolder)
    }

    /**
     * Copy a bundle into the app's storage: to another name first, then checked against its manifest and renamed.
     *
     * A bundle of the same name is replaced, unless it has the same manifest; then nothing is copied.
     *
     * @throws InputError the source is no bundle, does not fit, cannot be read, or is damaged.
     */
    fun install(source: BundleSource, report: Report): BundleFolder =
        try {
            install(safeName(source.name), source.files(), report)
        } catch (error: IOException) {
            throw InputError("the bundle cannot be copied (${error.message}); try again, or pick another folder", error)
        } finally {
            clean()
        }

    private fun install(name: String, files: List<SourceFile>, report: Report): BundleFolder {
        val manifest = files.find { it.name == MANIFEST }
            ?: throw InputError("$name: not a bundle, $MANIFEST is missing; pick the folder that `export` wrote")
        val place = File(installed, name)
        val known = File(place, MANIFEST)
        if (!known.isFile || !manifest.open().use { it.readBytes() }.contentEquals(known.readBytes())) {
            val aside = File(installed, ".new-$name")
            if (!aside.mkdirs()) throw IOException("$aside cannot be made")
            copy(name, files, aside, report)
            check(name, aside, report)
            replace(place, aside)
        }
        return BundleFolder(place)
    }

    private fun copy(name: String, files: List<SourceFile>, aside: File, report: Report) {
        val total = files.sumOf { it.size }
        if (total > aside.usableSpace) {
            throw InputError(
                "$name: has ${megabytes(total)} MB, ${megabytes(aside.usableSpace)} MB of storage are free; make room",
            )
        }
        val block = ByteArray(1 shl 18)
        var done = 0L
        for (file in files) {
            file.open().use { from ->
                FileOutputStream(File(aside, safeName(file.name))).use { to ->
                    while (true) {
                        report.at(Work(Step.COPYING, done, total))
                        val count = from.read(block)
                        if (count < 0) break
                        to.write(block, 0, count)
                        done += count
                    }
                    to.fd.sync() // a renamed bundle must not lose bytes when the battery fails
                }
            }
        }
    }

    private fun check(name: String, aside: File, report: Report) {
        val manifest = readManifest(aside)
        val total = manifest.files.values.sumOf { it.size }
        val progress = counted(Step.CHECKING, total, report)
        firstChangedFile(aside, manifest, deviceFolder(devices, manifest), progress = progress)?.let {
            throw InputError("$name: $it: not as $MANIFEST says; copy it to the phone again")
        }
    }

    private fun replace(place: File, aside: File) {
        val old = File(installed, OLD_PREFIX + place.name)
        if (place.exists() && !place.renameTo(old)) throw IOException("$place cannot be replaced")
        if (!aside.renameTo(place)) {
            old.renameTo(place)
            throw IOException("$place cannot be made")
        }
    }

    /** Remove what an interrupted copy left; a bundle that was being replaced is restored. */
    private fun clean() {
        for (file in installed.listFiles().orEmpty().filter { it.name.startsWith(".") }) {
            val place = File(installed, file.name.removePrefix(OLD_PREFIX))
            val lost = file.name.startsWith(OLD_PREFIX) && !place.exists()
            if (!lost || !file.renameTo(place)) file.deleteRecursively()
        }
    }
}

/** A progress that reports the bytes done so far, of a [total], as a [step]. */
fun counted(step: Step, total: Long, report: Report): Progress {
    var done = 0L
    return Progress { _, bytes ->
        done += bytes
        report.at(Work(step, done, total))
    }
}

/** Check a name from outside of the app, which must not lead out of the folder that it is put into. */
private fun safeName(name: String): String {
    if (name.isEmpty() || name.startsWith(".") || File(name).name != name) {
        throw InputError("'$name': not a name for a file of a bundle; rename it")
    }
    return name
}

private fun megabytes(bytes: Long) = (bytes + 999_999) / 1_000_000
