package gemmamtp.demo

import gemmamtp.core.InputError
import gemmamtp.core.MANIFEST
import gemmamtp.download.BundleFiles
import gemmamtp.download.DownloadProgress
import gemmamtp.download.Trial
import gemmamtp.download.copyBundle
import gemmamtp.download.downloadBundle
import gemmamtp.download.installedBundle
import java.io.Closeable
import java.io.File
import java.io.IOException

/** A bundle that can be opened: its directory. */
data class BundleFolder(val dir: File) {
    val name: String get() = dir.name
}

/** A place that a bundle can be copied from. A bundle is mapped into memory, so it must be files on disk. */
interface BundleSource : BundleFiles, Closeable {
    /** Throws IOException if the place does not tell its name. */
    val name: String
}

/** What is beside a bundle while another comes; it goes on from there. */
private const val UNFINISHED = ".download"

/**
 * The bundles of this device.
 *
 * @param installed the folder of the app's own copies.
 * @param pushed folders outside of the app that have bundles in them, or are bundles.
 */
class Bundles(private val installed: File, private val pushed: List<File>) {
    /** All bundles, by name; folders that cannot be read have none. */
    fun list(): List<BundleFolder> {
        val own = installed.list().orEmpty().map { it.removePrefix(".old-") }.distinct().sorted()
            .filter { !it.endsWith(UNFINISHED) }.mapNotNull { installedBundle(File(installed, it)) }
        val others = pushed.flatMap { folder -> listOf(folder) + folder.listFiles().orEmpty().sorted() }
            .filter { !it.name.startsWith(".") && File(it, MANIFEST).isFile }
        return (own + others).map(::BundleFolder)
    }

    /**
     * Copy a bundle into the app's storage, in place of one of the same name.
     *
     * What was copied before an interruption is kept until another bundle is copied or downloaded.
     *
     * @throws InputError as [copyBundle].
     */
    fun install(source: BundleSource, report: Report): BundleFolder {
        val name = try {
            source.name
        } catch (error: IOException) {
            throw InputError("the bundle cannot be copied (${error.message}); try again, or pick another folder", error)
        }
        return BundleFolder(copyBundle(source, place(name), bytes(Step.COPYING, report)))
    }

    /**
     * Download a bundle into the app's storage, in place of one of the same name: that of its folder on the server.
     *
     * @throws InputError as [downloadBundle].
     */
    fun download(url: String, digest: String, report: Report, trial: Trial): BundleFolder {
        val place = place(url.trim().trimEnd('/').substringAfterLast('/'))
        val progress = bytes(Step.DOWNLOADING, report)
        return BundleFolder(downloadBundle(url.trim(), digest.trim(), place, progress = progress, open = trial))
    }

    /** Where a bundle is to be; what was begun of others goes, since nobody may come back for it. */
    private fun place(name: String): File {
        if (name.isEmpty() || name.startsWith(".") || name.endsWith(UNFINISHED) || File(name).name != name) {
            throw InputError("'$name': not a name for a bundle; rename its folder")
        }
        for (file in installed.listFiles().orEmpty()) {
            if (file.name.endsWith(UNFINISHED) && file.name != name + UNFINISHED) file.deleteRecursively()
        }
        return File(installed, name)
    }
}

private fun bytes(step: Step, report: Report) = DownloadProgress { done, total -> report.at(Work(step, done, total)) }
